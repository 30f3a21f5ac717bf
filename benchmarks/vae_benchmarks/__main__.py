"""`python -m vae_benchmarks` is the command vae-bench."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="vae-bench")
