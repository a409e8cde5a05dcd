"""A run folder on an S3 server: what goes there in which order, what comes back, who may write."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3Server, s3_server, use_credentials

from pear_ray.artifacts import manifest
from pear_ray.artifacts.run_dir import claim
from pear_ray.artifacts.stored import run as stored_run
from pear_ray.artifacts.stored.lease import Lease, is_driven, read_claims
from pear_ray.artifacts.stored.location import CACHE_VARIABLE
from pear_ray.artifacts.stored.objects import ObjectFolder
from pear_ray.artifacts.stored.push import SNAPSHOT_FILE
from pear_ray.artifacts.stored.reading import see_artifact, see_run
from pear_ray.artifacts.stored.run import RunFolder, run_folder
from pear_ray.errors import ConfigError, InputError, StorageError

ELSEWHERE = ("elsewhere", "pid:[1]")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(autouse=True)
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty bucket `runs`, and no pushes but those that a test asks for."""
    use_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(stored_run, "PUSH_S", 600.0)
    server.client().create_bucket(Bucket="runs")
    yield
    server.post("reset")


def driven(
    server: S3Server, *, wait_s: float = 10.0
) -> contextlib.AbstractContextManager[RunFolder]:
    return run_folder(server.location("runs/team"), "demo", wait_s=wait_s)


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """From now on this is another machine, with an empty disk or the one of that name."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))


def begin(folder: RunFolder, stage: str, fingerprint: str) -> Path:
    claim(folder.path, name="demo")
    with folder.quiet():
        manifest.begin(folder.path / stage, fingerprint)
    return folder.path / stage


def make(folder: RunFolder, stage: str, fingerprint: str = "one", **files: str) -> None:
    stage_dir = begin(folder, stage, fingerprint)
    for name, content in files.items():
        (stage_dir / name).write_text(content, encoding="utf-8")
    manifest.complete(stage_dir, counts={})
    folder.settle(stage)


def names(server: S3Server) -> set[str]:
    """What is in the run's folder, without folders' marks and what only drivers write."""
    found = server.client().list_objects_v2(Bucket="runs", Prefix="team/demo/").get("Contents", [])
    keys = {each["Key"].removeprefix("team/demo/") for each in found}
    return {key for key in keys if not key.startswith(".") and not key.endswith("/") and key}


def writes(server: S3Server, since: int) -> list[str]:
    """What was put and deleted, in order, without claims and multiples."""
    found = [line.partition("?")[0] for line in server.requests(since)]
    found = [line.replace("/runs/team/demo/", "") for line in found]
    return [
        line
        for line in found
        if line.startswith(("PUT ", "DELETE ")) and "/." not in line and " ." not in line
    ]


def test_the_manifest_goes_last_and_only_what_changed_goes(server: S3Server) -> None:
    with driven(server) as folder:
        since = server.num_requests()
        make(folder, "score", rows="r" * 100, other="o")
        order = writes(server, since)
        assert set(order[:2]) <= {
            "PUT run.json",
            "PUT score/unfinished.json",
            "PUT score/rows",
            "PUT score/other",
        }
        assert order[-1] == "DELETE score/unfinished.json" or order[-1].startswith("PUT score/")
        puts = [line for line in order if line.startswith("PUT ") and not line.endswith("/")]
        assert puts[-1] == "PUT score/manifest.json"
        assert names(server) == {"run.json", "score/rows", "score/other", "score/manifest.json"}
        since = server.num_requests()
        folder.settle("score")
        assert writes(server, since) == []
        (folder.path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
        folder.settle("score")
        assert writes(server, since) == ["PUT metrics.jsonl"]


def test_a_push_that_breaks_off_leaves_no_whole_artifact(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One file of the artifact cannot be read: a link that leads nowhere."""
    with driven(server) as folder:
        stage_dir = begin(folder, "score", "one")
        (stage_dir / "rows").write_text("rows", encoding="utf-8")
        (stage_dir / "more").symlink_to(tmp_path / "more")
        manifest.complete(stage_dir, counts={})
        folder.settle("score")
    assert "score/manifest.json" not in names(server)
    (tmp_path / "more").write_text("more", encoding="utf-8")
    with driven(server):
        assert {"score/more", "score/manifest.json"} <= names(server)


def test_a_driver_killed_while_it_pushes_leaves_no_whole_artifact(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process of its own pushes 60 MB in 30 files, and is killed at the first of them."""
    with driven(server) as folder:
        claim(folder.path, name="demo")
    program = (
        "import sys; from pear_ray.artifacts import manifest; "
        "from pear_ray.artifacts.stored.run import run_folder\n"
        "with run_folder(sys.argv[1], 'demo', wait_s=60) as folder:\n"
        "    with folder.quiet():\n"
        "        manifest.begin(folder.path / 'score', 'one')\n"
        "        for n in range(30): (folder.path / f'score/rows-{n}').write_bytes(bytes(2**21))\n"
        "        manifest.complete(folder.path / 'score', counts={})\n"
        "    folder.settle('score')\n"
    )
    since = server.num_requests()
    process = subprocess.Popen([sys.executable, "-c", program, server.location("runs/team")])
    while not any(line.startswith("PUT /runs/team/demo/score/") for line in server.requests(since)):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    there = names(server)
    assert 0 < len([name for name in there if name.startswith("score/rows-")]) < 30
    assert "score/manifest.json" not in there
    elsewhere(monkeypatch, tmp_path, "second")
    with driven(server) as folder:
        assert not manifest.is_current(folder.path / "score", "one")
        assert not manifest.is_begun(folder.path / "score", "one")  # begun is told by its file too


def test_everything_comes_back_on_an_empty_disk_by_need(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with driven(server) as folder:
        make(folder, "collect", rows="c" * 2**21)
        make(folder, "sft", rows="s", **{"model.safetensors": "w" * 2**21})
    elsewhere(monkeypatch, tmp_path, "second")
    with driven(server) as folder:
        assert manifest.is_current(folder.path / "sft", "one")
        assert not (folder.path / "collect" / "rows").exists()
        folder.bring("score", unfinished=False)
        assert (folder.path / "collect" / "rows").read_text() == "c" * 2**21
        assert not (folder.path / "sft" / "model.safetensors").exists()
        folder.bring("report", unfinished=False)
        assert not (folder.path / "sft" / "model.safetensors").exists()
        folder.bring("rl", unfinished=False)
        assert (folder.path / "sft" / "model.safetensors").exists()
        since = server.num_requests()
        folder.settle("rl")
        assert writes(server, since) == []


def test_other_work_in_a_stage_first_removes_what_makes_the_old_trusted(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with driven(server) as folder:
        make(folder, "score", rows="old", old="old")
        stage_dir = begin(folder, "score", "two")
        (stage_dir / "rows").write_text("new", encoding="utf-8")
        since = server.num_requests()
        folder.settle("score")
        order = [line for line in writes(server, since) if not line.endswith("/")]
        assert order[0] == "DELETE score/manifest.json"
        assert order[-2:] == ["PUT score/unfinished.json", "PUT score/rows"]
        assert names(server) == {"run.json", "score/rows", "score/unfinished.json"}
    elsewhere(monkeypatch, tmp_path, "second")
    with driven(server) as folder:
        assert manifest.is_begun(folder.path / "score", "two")
        folder.bring("score", unfinished=True)
        assert (folder.path / "score" / "rows").read_text() == "new"


def test_what_was_begun_anew_and_never_told_is_not_mixed_with_the_old(server: S3Server) -> None:
    """The driver dies between beginning other work and its first push."""
    with driven(server) as folder:
        make(folder, "score", rows="old", old="old")
        copy = folder.path
    manifest.begin(copy / "score", "two")
    with driven(server) as folder:
        assert manifest.is_begun(folder.path / "score", "two")
        folder.bring("score", unfinished=True)
        assert sorted(path.name for path in (copy / "score").iterdir()) == ["unfinished.json"]
        assert names(server) == {"run.json", "score/unfinished.json"}


def snapshot(stage_dir: Path, *steps: int) -> None:
    """Checkpoints of `steps`, as Ray Train leaves them."""
    (stage_dir / "train").mkdir(exist_ok=True)
    for step in steps:
        (stage_dir / "train" / f"step-{step}").mkdir(exist_ok=True)
        (stage_dir / "train" / f"step-{step}" / "weights").write_text(f"{step}", encoding="utf-8")
    results = [{"checkpoint_dir_name": f"step-{step}"} for step in steps]
    tree = {"checkpoint_results": results, "latest_checkpoint_result": results[-1]}
    (stage_dir / SNAPSHOT_FILE).write_text(json.dumps(tree), encoding="utf-8")


def test_checkpoints_go_when_they_are_whole_and_their_list_after_them(server: S3Server) -> None:
    with driven(server) as folder:
        stage_dir = begin(folder, "sft", "one")
        snapshot(stage_dir, 2)
        (stage_dir / "train" / "step-4").mkdir()
        (stage_dir / "train" / "step-4" / "weights").write_text("half", encoding="utf-8")
        since = server.num_requests()
        folder.settle("sft")
        order = [line for line in writes(server, since) if not line.endswith("/")]
        assert order[-2:] == ["PUT sft/train/step-2/weights", f"PUT sft/{SNAPSHOT_FILE}"]
        assert "PUT sft/train/step-4/weights" not in order
        snapshot(stage_dir, 2, 4)
        snapshot(stage_dir, 4, 6)
        shutil.rmtree(stage_dir / "train" / "step-2")
        folder.settle("sft")
        there = {name for name in names(server) if name.startswith("sft/train/")}
        assert there == {
            "sft/train/step-4/weights",
            "sft/train/step-6/weights",
            f"sft/{SNAPSHOT_FILE}",
        }
        (stage_dir / SNAPSHOT_FILE).write_text('{"half', encoding="utf-8")  # it is being written
        since = server.num_requests()
        folder.settle("sft")
        assert writes(server, since) == []


def test_of_two_machines_the_one_that_wrote_last_is_right(
    server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with driven(server) as folder:
        make(folder, "score", rows="first")
        first = folder.path
    elsewhere(monkeypatch, tmp_path, "second")
    with driven(server) as folder:
        make(folder, "score", "two", rows="second")
    elsewhere(monkeypatch, tmp_path, "cache")
    with driven(server) as folder:
        assert folder.path == first
        assert manifest.is_current(first / "score", "two")
        folder.bring("sft", unfinished=False)
        assert (first / "score" / "rows").read_text() == "second"
    elsewhere(monkeypatch, tmp_path, "second")
    with driven(server) as folder:
        make(folder, "sft", rows="third")
    (first / "score" / "mine").write_text("never pushed", encoding="utf-8")
    elsewhere(monkeypatch, tmp_path, "cache")
    with driven(server):
        assert not (first / "score" / "mine").exists()
    assert "was written from elsewhere, or removed" in caplog.text
    (aside,) = first.parent.glob("demo.aside-*")
    assert (aside / "score" / "mine").read_text() == "never pushed"


def test_a_run_removed_from_the_store_begins_anew(server: S3Server) -> None:
    with driven(server) as folder:
        make(folder, "score", rows="rows")
        copy = folder.path
    server.post("reset")
    server.client().create_bucket(Bucket="runs")
    with driven(server):
        assert not (copy / "score" / "manifest.json").exists()


def test_a_second_driver_is_refused_and_told_who_holds_the_run(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with driven(server):
        elsewhere(monkeypatch, tmp_path, "second")
        began = time.monotonic()
        with (
            pytest.raises(InputError, match=f"process {os.getpid()} on .* is already driving"),
            driven(server),
        ):
            pass
        assert time.monotonic() - began < 15
        assert is_driven(ObjectFolder(server.location("runs/team/demo")))
    with driven(server):  # it was given back
        pass


def test_claims_of_the_dead_and_the_silent_are_taken_over(server: S3Server) -> None:
    objects = ObjectFolder(server.location("runs/team/demo"))
    said: list[str] = []
    dead = Lease(objects, renew_s=600)
    dead.take(said.append)
    tree = json.loads(objects.read(f".claims/{dead.identity}.json") or b"")
    objects.write(f".claims/{dead.identity}.json", json.dumps(tree | {"pid": 2**22 + 1}).encode())
    again = Lease(objects)
    again.take(said.append)
    assert said == []
    again.give_back()

    silent = Lease(objects, lease_s=3, renew_s=600, machine=ELSEWHERE)
    silent.take(said.append)
    began = time.monotonic()
    other = Lease(objects, lease_s=3, renew_s=1)
    other.take(said.append)
    assert 2 < time.monotonic() - began < 30
    assert len(said) == 1
    assert "on elsewhere drove" in said[0]
    silent.renew()
    assert silent.lost is not None
    assert "has taken it over" in silent.lost
    assert [claim.host for claim in read_claims(objects)] != [ELSEWHERE[0]]
    other.give_back()
    assert read_claims(objects) == []


def test_of_several_drivers_at_once_one_gets_the_run(server: S3Server) -> None:
    objects = ObjectFolder(server.location("runs/team/demo"))
    outcomes: list[str] = []

    def drive(number: int) -> None:
        lease = Lease(objects, renew_s=1, machine=(f"machine-{number}", "pid:[1]"))
        try:
            lease.take(lambda _: None)
            outcomes.append("held")
            leases.append(lease)
        except InputError:
            outcomes.append("refused")

    leases: list[Lease] = []
    threads = [threading.Thread(target=drive, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]
    leases[0].give_back()


def test_a_store_that_stops_serving_ends_the_run_with_what_is_where(server: S3Server) -> None:
    """It refuses everything from the middle on; the next driver here pushes what is missing."""
    said: list[str] = []
    with driven(server, wait_s=1.0) as folder:
        make(folder, "collect", rows="c")
        folder.say_through(said.append)
        server.post("reset-auth", b"0")
        with pytest.raises(StorageError) as caught:
            make(folder, "score", rows="s")
        copy = folder.path
    server.post("reset-auth", b"inf")
    assert "Safe there: collect. Only here, in " in str(caught.value)
    assert "2 files" in str(caught.value)
    assert len(said) == 1
    assert f"the run goes on, and what it makes stays in {copy}" in said[0]
    assert not any(name.startswith("score/") for name in names(server))
    client = server.client()  # the claim of that driver, whose process would be gone by now
    for each in client.list_objects_v2(Bucket="runs", Prefix="team/demo/.claims/")["Contents"]:
        client.delete_object(Bucket="runs", Key=each["Key"])
    with driven(server):
        assert {"score/manifest.json", "score/rows"} <= names(server)


def test_a_store_that_is_gone_is_told_of(server: S3Server, tmp_path: Path) -> None:
    with s3_server(tmp_path) as other:
        other.client().create_bucket(Bucket="runs")
        with driven(other, wait_s=1.0) as folder:
            other.process.terminate()
            other.process.wait()
            with pytest.raises(StorageError, match="Safe there: no stage yet"):
                make(folder, "score", rows="s")
            assert (folder.path / "score" / "rows").read_text() == "s"


@pytest.mark.parametrize(
    ("output_dir", "error", "words"),
    [
        ("s3://absent/team{query}", InputError, "has no bucket 'absent'"),
        (
            "s3://runs/team?endpoint_override=http://127.0.0.1:1&region=x",
            InputError,
            "NETWORK_CONNECTION",
        ),
        ("s3://key:secret@runs/team{query}", InputError, "carries credentials"),
        ("ftp://runs/team", ConfigError, "an object store"),
        ("s3://{query}", ConfigError, "names no bucket"),
        ("s3://runs/team?endpoint=x", InputError, "unknown in an s3:// query: endpoint"),
    ],
)
def test_what_cannot_be_used_is_one_error_soon(
    server: S3Server, output_dir: str, error: type[Exception], words: str
) -> None:
    location = output_dir.format(query=server.location("").removeprefix("s3://"))
    began = time.monotonic()
    with pytest.raises(error, match=words) as caught, run_folder(location, "demo", wait_s=1):
        pass
    assert time.monotonic() - began < 5
    assert str(caught.value).startswith("output_dir=")
    assert "\n" not in str(caught.value)


def test_credentials_that_the_store_does_not_know(server: S3Server) -> None:
    server.post("reset-auth", b"0")
    try:
        with pytest.raises(InputError, match="ACCESS_DENIED") as caught, driven(server):
            pass
        assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    finally:
        server.post("reset-auth", b"inf")


def test_what_is_not_this_run_is_left_alone(server: S3Server) -> None:
    server.client().put_object(Bucket="runs", Key="team/demo/thesis.tex", Body=b"mine")
    with pytest.raises(InputError, match=r"holds objects but no run\.json"), driven(server):
        pass
    identity = json.dumps({"name": "other"}).encode()
    server.client().put_object(Bucket="runs", Key="team/demo/run.json", Body=identity)
    with pytest.raises(InputError, match="belongs to run 'other', not 'demo'"), driven(server):
        pass
    assert names(server) == {"thesis.tex", "run.json"}


def test_readers_see_the_run_without_writing(server: S3Server) -> None:
    uri = server.location("runs/team/demo")
    with driven(server) as folder:
        make(folder, "score", rows="1", **{"w.safetensors": "w"})
        since = server.num_requests()
        seen = see_run(uri)
        assert seen.is_driven
        assert seen.path != folder.path
        assert manifest.is_current(seen.path / "score", "one")
    assert see_run(uri).is_driven is False
    artifact = see_artifact(server.location("runs/team/demo/score"))
    assert (artifact / "rows").read_text() == "1"
    assert writes(server, since) == []
    with pytest.raises(InputError, match="has no run there"):
        see_run(server.location("runs/team/absent"))
    with pytest.raises(InputError, match="has no run there"):
        see_artifact(server.location("runs/team"))
