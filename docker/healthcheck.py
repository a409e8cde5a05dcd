"""Whether the container is well: its Ray node answers, or it runs none and nothing is to ask.

The agent of a Ray node answers on a port of its own, which token authentication leaves open.
"""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

AGENT_PORT = 52365  # Ray's default for --dashboard-agent-listen-port
WAIT_S = 5.0


def main() -> int:
    """Ask the node; the exit code: 0, or 1 where a node is there and does not answer."""
    if not runs_a_node():
        return 0
    port = os.environ.get("RAY_AGENT_PORT", str(AGENT_PORT))
    url = f"http://127.0.0.1:{port}/api/local_raylet_healthz"
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            return 0 if b"success" in answer.read() else 1
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"no answer from Ray's node at {url}: {error}\n")
        return 1


def runs_a_node() -> bool:
    """Whether a process of the container is Ray's raylet."""
    for process in Path("/proc").glob("[0-9]*/comm"):
        try:
            if process.read_text(encoding="utf-8").strip() == "raylet":
                return True
        except OSError:
            continue  # it has ended in between
    return False


if __name__ == "__main__":
    sys.exit(main())
