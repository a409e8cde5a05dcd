"""A Ray cluster with Ray's own autoscaler (v2), whose nodes are processes with made-up devices.

As `ray.cluster_utils.AutoscalingCluster`, which begins and ends with `ray stop` for every Ray of
the user, wants a file that the wheel leaves out, and takes fixed ports.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from free_ports import free_ports
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray_head import end_tree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the provider knows no other name
STARTS = 3
START_S = 120.0
BOOT_S = 4.0  # of a cloud's machine: minutes


class BootingProvider(FakeMultiNodeProvider):
    """Ray's provider of processes as nodes, which take a while to come."""

    def create_node_with_resources_and_labels(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(BOOT_S)
        return super().create_node_with_resources_and_labels(*args, **kwargs)


def node_type(
    max_nodes: int, labels: Mapping[str, str] | None = None, /, **resources: float
) -> dict[str, Any]:
    """An entry of `available_node_types`."""
    return {
        "resources": resources,
        "labels": dict(labels or {}),
        "node_config": {},
        "min_workers": 0,
        "max_workers": max_nodes,
    }


class FakeCluster:
    """A head without work that grows by `types`, as long as the `with` block.

    Attributes:
        address: Of its GCS.
    """

    def __init__(self, types: Mapping[str, dict[str, Any]], *, idle_s: float) -> None:
        self.address = ""
        # Not under pytest's folder: a socket's path has 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="fake-", ignore_cleanup_errors=True)
        self._types = dict(types)
        self._idle_s = idle_s

    def __enter__(self) -> "FakeCluster":
        # Ray gives a raylet 30 s to come up, which a busy machine does not always keep.
        for left in reversed(range(STARTS)):
            said = self._start()
            if said is None:
                return self
            if not left or "timed out during startup" not in said:
                self._folder.cleanup()
                raise RuntimeError(f"the head did not start: {said}")
        raise AssertionError("the last start returns or raises")

    def _start(self) -> str | None:
        """Start the head; what it said where it did not start."""
        ip = socket.gethostbyname(socket.gethostname())
        self.address = f"{ip}:{free_ports(1)[0]}"
        folder = Path(self._folder.name)
        settings = folder / "cluster.json"
        settings.write_text(json.dumps(self._settings()), encoding="utf-8")
        ip, port = self.address.split(":")
        log = folder / "head.log"
        inherited = dict(os.environ)
        inherited.pop("CUDA_VISIBLE_DEVICES", None)  # with it, Ray looks for the GPUs
        with log.open("wb") as out:
            self._head = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("ray")),
                    "start",
                    "--head",
                    "--block",
                    f"--autoscaling-config={settings}",
                    f"--node-ip-address={ip}",
                    f"--port={port}",
                    "--num-cpus=0",
                    f"--temp-dir={folder}/ray",
                    "--include-dashboard=false",
                    "--dashboard-agent-listen-port=0",
                    f"--ray-client-server-port={free_ports(1)[0]}",
                    "--object-store-memory=100000000",
                    "--disable-usage-stats",
                ],
                env=inherited
                | {
                    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                    "RAY_FAKE_CLUSTER": "1",
                    "RAY_enable_autoscaler_v2": "1",
                    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
                    "RAY_NODE_TYPE_NAME": HEAD_TYPE,
                    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, HERE.parent))),
                },
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while b"Ray runtime started" not in log.read_bytes():
            if self._head.poll() is not None or time.monotonic() > deadline:
                self._end()
                return log.read_text(encoding="utf-8")[-2000:]
            time.sleep(0.2)
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the head, and its nodes."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        """Its nodes are children of its autoscaler; of a head that is gone, orphans."""
        started = [
            each
            for each in psutil.process_iter(["cmdline"])
            if self._folder.name in " ".join(each.info["cmdline"] or [])
        ]
        end_tree(self._head, started)

    def num_nodes(self) -> int:
        """How many nodes there are beside the head."""
        return sum(name == "raylet" for name, _ in self._processes()) - 1

    def processes_of(self, actor: str) -> list[psutil.Process]:
        """The processes of the actor class."""
        return [process for name, process in self._processes() if actor in name]

    def nodes_with(self, actor: str) -> list[str]:
        """The types of the nodes that a process of the actor class is on."""
        raylets, found = set(), []
        for process in self.processes_of(actor):
            with contextlib.suppress(psutil.NoSuchProcess):
                raylets.add(process.ppid())
        for raylet in raylets:
            with contextlib.suppress(psutil.NoSuchProcess):
                node = psutil.Process(raylet)
                if node.name() == "raylet":  # and not whoever takes in what it left behind
                    found.append(node.environ()["RAY_NODE_TYPE_NAME"])
        return sorted(found)

    def _processes(self) -> list[tuple[str, psutil.Process]]:
        """Each process, and what Ray calls it."""
        found = []
        for process in psutil.Process(self._head.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = process.cmdline()
                is_raylet = Path(line[0]).name == "raylet" if line else False
                found.append(("raylet" if is_raylet else " ".join(line), process))
        return found

    def log(self, name: str) -> str:
        """The end of one of its logs."""
        return (Path(self._folder.name) / "ray/session_latest/logs" / name).read_text()[-3000:]

    def _settings(self) -> dict[str, Any]:
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "fake",
            "max_workers": sum(each["max_workers"] for each in self._types.values()),
            "idle_timeout_minutes": self._idle_s / 60,
            "upscaling_speed": 1.0,
            "provider": {
                "type": "external",
                "module": f"{Path(__file__).stem}.{BootingProvider.__name__}",
                "gcs_address": self.address,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
            },
            "auth": {"ssh_user": "nobody"},
            "head_node_type": HEAD_TYPE,
            "available_node_types": self._types | {HEAD_TYPE: head},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
        }
