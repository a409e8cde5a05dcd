"""What is said of a policy that does not end its completions."""

from pear_ray.distributed.rl_endings import explain_endings
from pear_ray.embedded.paths import embedded_path
from pear_ray.engines.chat import ChatTokenizer


def test_a_template_whose_end_token_nobody_stops_at() -> None:
    said = explain_endings(["<|endoftext|>"], "<|im_end|>\n")
    assert "end at <|endoftext|> alone, and the chat template writes '<|im_end|>\\n' behind" in said
    assert "Set eos_token in the policy's tokenizer_config.json" in said
    assert "writes nothing behind" in explain_endings(["</s>"], "")


def test_a_template_that_ends_answers_as_the_engine_does() -> None:
    said = explain_endings(["<|endoftext|>", "<|im_end|>"], "<|im_end|>\n")
    assert "end at <|endoftext|> or <|im_end|>, as the chat template's answers do" in said
    assert "raise rl.max_tokens" in said
    assert "eos_token" not in said


def test_the_embedded_template_ends_an_answer() -> None:
    chat = ChatTokenizer(embedded_path("student"))
    assert chat.answer_ending() == "<|end|>"
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert chat.answer_ending() == ""
