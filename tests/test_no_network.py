"""No command opens a connection: nothing but the files that were named is needed."""

from __future__ import annotations

import subprocess
import sys

NO_NETWORK = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print(event, arguments, file=sys.stderr)
        raise SystemExit(99)
sys.addaudithook(watch)
from gemma_convert.cli.app import main
for line in open(sys.argv[1]).read().splitlines():
    sys.argv = ["gemma-convert", *line.split()]
    try:
        main()
    except SystemExit as ending:
        if ending.code:
            raise
"""


def test_no_command_opens_a_connection(tmp_path):
    commands = tmp_path / "commands"
    at = str(tmp_path)
    commands.write_text(
        f"tiny 31b {at}/hf --layers 6\n"
        f"to-native {at}/hf {at}/out --format maxtext --verify\n"
        f"inspect {at}/out\n"
        f"verify {at}/out --against {at}/hf\n"
        f"to-hf {at}/out {at}/back\n"
        f"to-native {at}/out {at}/other --format fast-llm\n"
        f"golden {at}/hf {at}/golden.safetensors --tokens 20\n"
        f"logit-check {at}/hf {at}/out --tokens 20\n"
        f"logit-check {at}/hf {at}/other --golden {at}/golden.safetensors\n"
        f"flops {at}/out --seq-len 100\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(commands)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "config.json").exists()


def test_the_watch_sees_a_connection(tmp_path):
    code = NO_NETWORK.split("from gemma_convert", maxsplit=1)[0] + "import socket\n"
    code += "socket.create_connection(('127.0.0.1', 9))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 99
