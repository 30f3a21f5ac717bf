"""`python -m vae_export` is the command vae-export."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="vae-export")
