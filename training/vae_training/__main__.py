"""`python -m vae_training` is the command vae-train."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="vae-train")
