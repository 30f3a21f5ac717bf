"""`python -m vae_runtime` is the command vae-run."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="vae-run")
