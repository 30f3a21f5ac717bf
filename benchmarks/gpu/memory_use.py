"""How much of the GPU's memory a bundle takes, loaded and for reconstructions: its request is the only argument, as
JSON, and the bytes are what it prints. A process of its own, as a pool of memory lasts as long as that."""

from __future__ import annotations

import json
import sys

from vae_benchmarks.gpu import memory_in_use
from vae_benchmarks.worker import examples
from vae_runtime import VAE
from vae_runtime.devices import find_device

BATCH = 32


def main() -> None:
    request = json.loads(sys.argv[1])
    index = find_device(request["device"]).memory[1]
    before = memory_in_use(index)  # CUDA's own share is taken by asking
    with VAE.load(request["bundle"], request["device"], provider_options=request["options"]) as vae:
        vae.reconstruct(examples(vae, BATCH, None))
        sys.stdout.write(f"{memory_in_use(index) - before}\n")


if __name__ == "__main__":
    main()
