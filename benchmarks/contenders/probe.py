"Report the versions and the hardware of an environment."

import platform
from importlib import metadata, util

from pacing import Channel, serve

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "langformers", "numpy", "pyarrow")


def probe(channel: Channel, job: dict) -> None:
    "Send versions, threads, and the GPU if there is one."
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        if util.find_spec(name):
            versions[name] = metadata.version(name)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    channel.send(versions=versions, threads=torch.get_num_threads(), gpu=gpu)


if __name__ == "__main__":
    serve({"probe": probe})
