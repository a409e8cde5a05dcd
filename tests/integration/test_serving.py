"""`pear serve` as a user starts it: two models, an adapter, a key, asked by OpenAI's client."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from free_ports import free_ports

from pear_ray.config.lora import LoraConfig
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.chat import ChatTokenizer
from pear_ray.engines.hf_scorer import reference_logprobs

openai = pytest.importorskip("openai", reason="its client comes with vLLM")
KEY = "0123456789abcdef-of-the-test"
QUESTION = "7+2-5+8+1-4="
START_S = 300.0  # on a machine that does much else
TOLERANCE = 1e-4  # nats, in float32


@dataclass(frozen=True)
class Server:
    """One that runs, and where its Ray writes."""

    base_url: str
    ray_dir: Path
    folders: dict[str, Path]
    process: subprocess.Popen[str]

    def client(self, key: str = KEY) -> "openai.OpenAI":
        """OpenAI's own client, which asks once."""
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Student with an adapter on it, and teacher, whose files suggest a sampling of their own."""
    folder = tmp_path_factory.mktemp("served")
    folders = {"student": embedded_path("student"), "tuned": folder / "tuned"}
    folders["teacher"] = shutil.copytree(embedded_path("teacher"), folder / "teacher")
    suggested = folders["teacher"] / "generation_config.json"
    tree = json.loads(suggested.read_text()) | {"temperature": 0.01, "top_k": 1}
    suggested.write_text(json.dumps(tree))
    write_adapter(folders["tuned"])
    [port] = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="pear-") as ray_dir:  # short: Ray's sockets lie in it
        command = [
            sys.executable,
            "-m",
            "pear_ray",
            "serve",
            "embedded:student",
            "--port",
            f"{port}",
        ]
        command += [
            "--name",
            f"teacher={folders['teacher']}",
            "--lora",
            f"tuned={folders['tuned']}",
        ]
        environ = os.environ | {"PEAR_RAY_API_KEY": KEY, "RAY_TMPDIR": ray_dir}
        log = folder / "serve.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=environ, stdout=output, stderr=subprocess.STDOUT, text=True
            )
        try:
            wait_until_up(process, log)
            yield Server(f"http://127.0.0.1:{port}", Path(ray_dir), folders, process)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, log.read_text()


def wait_until_up(process: subprocess.Popen[str], log: Path) -> None:
    """Until the command says that its models answer."""
    deadline = time.monotonic() + START_S
    while "base URL" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def write_adapter(folder: Path) -> None:
    """An adapter on the student as our trainer writes one, with a B that is not zero."""
    from pear_ray.engines import lora
    from pear_ray.engines.policy import Policy, load_causal_lm

    base = embedded_path("student")
    policy = Policy(load_causal_lm(base))
    lora.adapt(policy, LoraConfig(rank=4, alpha=8), base=base, seed=1)
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: 0.1 * torch.randn(each.shape, generator=generator)
        for name, each in policy.named_parameters()
        if each.requires_grad
    }
    lora.write_adapter(policy, weights, folder)


def merged_folder(server: Server, folder: Path) -> Path:
    """The student with the adapter merged into its weights, as a model of its own."""
    from pear_ray.engines import lora

    base = server.folders["student"]
    shutil.copytree(base, folder)
    lora.merged(base, server.folders["tuned"]).causal_lm.save_pretrained(folder)
    return folder


def greedy_ids(folder: Path, prompt: list[int], *, num_tokens: int) -> list[int]:
    """What transformers goes on with, one argmax after another, without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["student", "teacher", "tuned"])
def test_tokens_and_logprobs_are_those_of_transformers(
    server: Server, name: str, tmp_path: Path
) -> None:
    folder = merged_folder(server, tmp_path / "m") if name == "tuned" else server.folders[name]
    prompt = ChatTokenizer(server.folders["student"]).prompt_ids(QUESTION)
    answer = server.client().completions.create(
        model=name,
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    [choice] = answer.choices
    found = choice.model_extra["token_ids"]
    assert found == greedy_ids(folder, prompt, num_tokens=24)
    [wanted] = reference_logprobs(folder, [prompt + found])
    served = choice.logprobs.token_logprobs
    assert served == pytest.approx(wanted[len(prompt) :], abs=TOLERANCE)


def test_models_and_adapters_are_listed(server: Server) -> None:
    models = server.client().models.list().data
    assert {each.id: each.model_extra["parent"] for each in models} == {
        "student": None,
        "tuned": "student",
        "teacher": None,
    }
    assert server.client().models.retrieve("tuned").id == "tuned"


def test_a_chat_is_written_as_in_training(server: Server) -> None:
    answer = server.client().chat.completions.create(
        model="student",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=4,
        extra_body={"return_token_ids": True},
    )
    wanted = ChatTokenizer(server.folders["student"]).prompt_ids(QUESTION)
    assert answer.model_extra["prompt_token_ids"] == wanted


def test_a_stream_is_the_same_answer(server: Server) -> None:
    asked = {
        "model": "student",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 48,
        "temperature": 1.0,
        "seed": 11,
        "logprobs": True,
    }
    client = server.client()
    [whole] = client.chat.completions.create(**asked).choices
    pieces = [each.choices[0] for each in client.chat.completions.create(**asked, stream=True)]
    assert len(pieces) > 2
    assert "".join(each.delta.content or "" for each in pieces) == whole.message.content
    assert pieces[-1].finish_reason == whole.finish_reason
    streamed = [token for each in pieces if each.logprobs for token in each.logprobs.content]
    assert [token.logprob for token in streamed] == pytest.approx(
        [token.logprob for token in whole.logprobs.content], abs=TOLERANCE
    )


def test_a_checkpoints_own_sampling_is_not_taken(server: Server) -> None:
    # With its top_k of 1 all samples would be alike.
    answer = server.client().chat.completions.create(
        model="teacher", messages=[{"role": "user", "content": QUESTION}], n=8, seed=3
    )
    assert len({each.message.content for each in answer.choices}) > 1


def test_only_who_has_the_key_gets_in(server: Server) -> None:
    import httpx

    with pytest.raises(openai.AuthenticationError, match="wrong API key") as refusal:
        server.client(key=KEY[:-1]).models.list()
    assert refusal.value.code == "invalid_api_key"
    without = httpx.post(f"{server.base_url}/v1/chat/completions", json={"model": "student"})
    assert (without.status_code, without.headers["www-authenticate"]) == (401, "Bearer")
    assert without.json()["error"]["type"] == "invalid_request_error"
    # For load balancers; the second is of Ray Serve's proxy.
    assert httpx.get(f"{server.base_url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.base_url}/-/healthz").status_code == 200


def test_requests_that_cannot_be_answered(server: Server) -> None:
    chats, hello = server.client().chat.completions, [{"role": "user", "content": "1+1="}]
    with pytest.raises(openai.NotFoundError, match="no model `other`; here are `student`, `tuned`"):
        chats.create(model="other", messages=hello)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        chats.create(model="student", messages=[{"role": "user", "content": "1" * 300}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chats.create(model="student", messages=hello, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        server.client().embeddings.create(model="student", input="1")


def test_the_key_is_in_none_of_rays_files(server: Server) -> None:
    files = [file for file in server.ray_dir.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def test_serve_yaml_is_what_ray_serve_takes() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from pear_ray.serving.app import build
    from pear_ray.serving.checkpoints import served_models
    from pear_ray.serving.production import serve_yaml
    from pear_ray.serving.settings import BUILDER, ServeSettings

    settings = ServeSettings(models=served_models(["embedded:student"], [], []), max_replicas=3)
    text = serve_yaml(settings, host="0.0.0.0", port=8000)
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == BUILDER == f"{build.__module__}:{build.__name__}"
    assert build(application.args)._bound_deployment.name == "gateway"
    assert "needs_key: true" in text
