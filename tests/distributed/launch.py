"""Start a script on two real processes that talk through gloo, and never wait for them for ever."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(script: Path, *arguments: object, options: tuple[str, ...] = (), timeout: int = 240) -> tuple[int, str]:
    """Run a script under torchrun and return its exit code and all that it wrote.

    Raises:
        subprocess.TimeoutExpired: if it hangs; its processes are ended first.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        # Restarted ranks else read the addresses of those that ended, and hang: github.com/pytorch/pytorch/issues/135712
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, str(script), *map(str, arguments)], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers, which are in sessions of their own
            process.wait(60)
            raise
        output.seek(0)
        return code, output.read()
