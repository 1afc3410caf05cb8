"""`python -m companion` on small files and scripted models: what it writes where, and how it ends."""

import os
import re
import signal
import subprocess
import sys
from random import Random

import pytest
import torch
from test_chat import CORPUS, END, START
from test_chat_server import END as LAST
from test_chat_server import chunk, server  # noqa: F401  a fixture
from test_stream import randomised
from typer.testing import CliRunner

import companion.cli as cli
from companion.chat import ChatModel, ChatPiece, LocalChatModel, Message, ScriptedChatModel
from companion.models.language_model import LanguageModel
from companion.models.llama import read_config, tensor_names
from companion.quantize.gguf import write_gguf
from companion.quantize.linear import QuantizedLinear
from companion.tokenizers.bpe import BYTE_ORDER, BPETokenizer

ANSI = re.compile(r"\x1b\[")
SETTINGS = {
    **{"model_type": "llama", "vocab_size": 300, "hidden_size": 24, "intermediate_size": 20},
    **{
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
TOKENIZER = BPETokenizer.train([*CORPUS, "user\nassistant\n" * 2], 300, special_tokens=[START, END])
LETTERS = {byte: chr(byte) if i < 188 else chr(68 + i) for i, byte in enumerate(BYTE_ORDER)}


def run(*arguments, **options):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), **options)


def plain(text):
    """Without the colours that some environments ask typer for."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch):
    """An environment that asks for no colour, and for none to be left out."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A GGUF file with a small model, its vocabulary and a template."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    model = randomised(LanguageModel(read_config(SETTINGS))).float()
    state, config = model.state_dict(), model.config
    names = ["".join(LETTERS[byte] for byte in TOKENIZER.token_bytes(token)) for token in range(2, 300)]
    merges = [f"{names[left - 2]} {names[right - 2]}" for left, right in TOKENIZER.merges]
    metadata = {
        "general.architecture": "llama",
        "general.name": "small \x1b[31m[bold]one[/bold]\n" + "x" * 200,
        "llama.context_length": config.max_length,
        "llama.embedding_length": 24,
        "llama.block_count": 2,
        "llama.feed_forward_length": 20,
        "llama.attention.head_count": 3,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [START, END, *names],
        "tokenizer.ggml.token_type": [3, 3] + [1] * 298,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": f"{{{{ '{START}system\\nBe small.{END}\\n' }}}}",
    }
    tensors = {theirs: state[ours] for ours, theirs in tensor_names(config, "gguf").items()}
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].half()
    write_gguf(path, metadata, tensors)
    return path


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(model)` lets the commands talk with this model, and a person sit before standard input."""

    def use(model, person=False):
        monkeypatch.setattr(cli, "chat_model", lambda *_, **__: model)
        monkeypatch.setattr(cli, "_is_person", lambda: person)
        return model

    return use


# --- Help and errors ----------------------------------------------------------------------------------------


def test_help_names_everything():
    commands = ("chat", "generate", "tokenize", "inspect")
    assert all(name in run("--help").output for name in commands)
    assert all(word in plain(run("chat", "--help").output) for word in ("--server", "135 million"))
    for command in commands:
        result = run(command, "--help")
        assert result.exit_code == 0 and f"python -m companion {command}" in plain(result.output)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["chat", "--temperature", "-1"], "temperature"),
        (["chat", "--top-p", "0"], "top_p must lie in (0, 1], got 0"),
        (["chat", "--max-tokens", "0"], "max-tokens"),
        (["chat", "--server", "http://127.0.0.1:9/v1"], "--model"),
        (["generate", "hi", "--model", "absent.gguf"], "absent.gguf"),
        (["generate", ""], "must hold a character"),
        (["generate", "hi", "--stop", ""], "empty string"),
        (["tokenize", "hi", "-v", "bert"], "neither smollm2, cl100k or minilm nor a file"),
        (["inspect", "absent.gguf"], "absent.gguf"),
        (["inspect"], "file"),
        (["rag"], "rag"),
    ],
)
def test_wrong_commands_end_with_2(arguments, needed):
    result = run(*arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2 and needed in plain(result.stderr) and not result.stdout


def one_error(result, match):
    assert result.exit_code == 1 and not result.stdout
    assert re.fullmatch(rf"Error: [^\n]*{match}[^\n]*\n", result.stderr), result.stderr


# --- chat ---------------------------------------------------------------------------------------------------


def test_a_piped_conversation(scripted):
    model = scripted(ScriptedChatModel(["Hello there.", "Fine."]))
    result = run("chat", "--system", "Be brief.", input="Hi\n\nHow are you?\n")
    assert result.exit_code == 0 and result.stdout == "Hello there.\nFine.\n"
    first = (Message("system", "Be brief."), Message("user", "Hi"))
    then = (Message("assistant", "Hello there."), Message("user", "How are you?"))
    assert model.calls == [first, first + then]
    speeds = result.stderr.splitlines()
    assert len(speeds) == 2 and re.match(r"3 tokens, the first after .* tokens per second$", speeds[0])
    assert not ANSI.search(result.stderr)


def test_options_reach_the_model(scripted):
    model = scripted(ScriptedChatModel(lambda _: "one two three", piece=1))
    assert run("chat", "--stop", "three", input="Hi\n").stdout == "one two \n"
    result = run("chat", "--max-tokens", "3", input="Hi\n")
    assert result.stdout == "one\n" and "cut off at --max-tokens" in result.stderr
    assert len(model.calls) == 2


class Faltering(ChatModel):
    """Says one word and fails as told; an answer to the next turn is whole."""

    def __init__(self, error):
        self.error, self.seen = error, []

    def answer(self, messages, sampling):
        self.seen.append([each.content for each in messages])
        yield ChatPiece("Well")
        if len(self.seen) == 1:
            raise self.error
        yield ChatPiece("!", finish="stop")


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(scripted):
    model = scripted(Faltering(KeyboardInterrupt()), person=True)
    result = run("chat", input="One\nTwo\n")
    assert result.exit_code == 0 and "Well!" in result.stdout and "(ended)" in result.stderr
    assert model.seen == [["One"], ["One", "Well", "Two"]]


def test_ctrl_c_in_a_pipe_ends_with_130(scripted):
    scripted(Faltering(KeyboardInterrupt()))
    result = run("chat", input="One\nTwo\n")
    assert result.exit_code == 130 and result.stdout == "Well" and not result.stderr


def test_ctrl_c_at_the_prompt_ends_with_130(scripted, monkeypatch):
    scripted(ScriptedChatModel([]), person=True)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert run("chat").exit_code == 130


def test_a_server(server):  # noqa: F811
    model = server([chunk("Yes"), chunk("\x1b[31m!"), *LAST])
    arguments = ["chat", "--server", server.url, "--model", "tiny", "--temperature", "0.5", "--seed", "4"]
    result = run(*arguments, input="Hi\n")
    assert result.exit_code == 0 and result.stdout == "Yes\x1b[31m!\n"  # a pipe gets what was said
    assert "3 chunks" in result.stderr
    body = server.requests[0][2]
    assert (body["model"], body["temperature"], body["seed"]) == ("tiny", 0.5, 4)
    assert model.model == "tiny"

    def refuse(handler, _):
        handler.begin(401, "application/json")
        handler.say('{"error": {"message": "no\\nkey"}}')

    server(refuse)
    result = run(*arguments, input="Hi\n", env={"OPENAI_API_KEY": "sk-secret"})
    one_error(result, r"refuses the key \(HTTP 401\): no key")
    server([chunk("broken ")])
    result = run(*arguments, input="Hi\n")
    assert result.exit_code == 1 and result.stdout == "broken " and "broke off" in result.stderr


def test_a_person_may_go_on_after_a_failure(scripted):
    from companion.chat import ChatServerError

    model = scripted(Faltering(ChatServerError("http://a is gone")), person=True)
    result = run("chat", input="One\nTwo\n")
    assert result.exit_code == 0 and "http://a is gone" in result.stderr and "Well!" in result.stdout
    assert len(model.seen) == 2


def test_control_characters_do_not_reach_a_terminal():
    assert cli._visible("a\x1b[2J\x07\x9b1m\tb\n🐈") == "a\ufffd[2J\ufffd\ufffd1m\tb\n🐈"


# --- A model from a file ------------------------------------------------------------------------------------


def test_chat_and_generate_with_a_file(small):
    local = LocalChatModel.from_gguf(small)
    assert local.template.default == Message("system", "Be small.")
    wanted = local.complete([Message("user", "the cat")], max_tokens=9)
    result = run("chat", "--model", small, "--max-tokens", "9", input="the cat\n")
    assert result.exit_code == 0 and result.stdout == wanted + "\n"
    ids = TOKENIZER.encode("the cat")
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(local.model(torch.tensor([ids]))[0, -1].argmax()))
    result = run("generate", "the cat", "--model", small, "--max-tokens", "6")
    assert result.stdout == TOKENIZER.decode(ids[-6:]) + "\n"
    again = run("generate", "-", "--model", small, "--max-tokens", "6", input="the cat")
    assert again.stdout == result.stdout
    drawn = [
        run("generate", "a", "--model", small, "--temperature", "2", "--top-p", "0.9", "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("weights", ["blocks", "int8"])
def test_weights_that_stay_quantised(small, weights):
    local = LocalChatModel.from_gguf(small, quantised=weights)
    assert isinstance(local.model.layers[0].feed_forward.down, QuantizedLinear)
    wanted = local.complete([Message("user", "the cat")], max_tokens=9)
    result = run("chat", "--model", small, "--weights", weights, "--max-tokens", "9", input="the cat\n")
    assert result.exit_code == 0 and result.stdout == wanted + "\n"
    if weights == "blocks":
        plain, kept = (run("generate", "a", "--model", small, *w) for w in ((), ("--weights", weights)))
        assert plain.stdout == kept.stdout != ""
    assert run("chat", "--weights", "int4").exit_code == 2


@pytest.mark.parametrize("command", [["chat", "--model"], ["generate", "hi", "--model"], ["inspect"]])
def test_a_file_that_is_no_model(tmp_path, command):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML" + bytes(60))
    one_error(run(*command, path, input="hi\n"), "not a GGUF file that can be read")


# --- tokenize -----------------------------------------------------------------------------------------------


def test_tokens_in_a_pipe(small):
    text = "the cat\n\tsat 猫 \u200b"
    result = run("tokenize", text, "-v", small)
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [int(token) for _, token, _ in rows] == TOKENIZER.encode(text)
    assert {name for name, _, _ in rows} == {"small.gguf"}
    spelled = "".join(piece for _, _, piece in rows)
    assert spelled.startswith("the␣cat⏎⇥sat␣") and not ANSI.search(result.stdout)
    assert run("tokenize", "-", "-v", small, input=text).stdout == result.stdout
    assert run("tokenize", "", "-v", small).stdout == ""


def test_real_vocabularies():
    rows = [
        line.split("\t") for line in run("tokenize", "Hello, unhappily", "-v", "minilm").stdout.splitlines()
    ]
    assert [piece for _, _, piece in rows] == ["hello", ",", "un", "##ha", "##pp", "##ily"]
    result = run("tokenize", "hello world", "-v", "cl100k", "-v", "smollm2")
    assert result.stdout.splitlines()[:2] == ["cl100k\t15339\thello", "cl100k\t1917\t␣world"]
    assert {line.split("\t")[0] for line in result.stdout.splitlines()} == {"cl100k", "smollm2"}


def test_tokens_on_a_terminal(small):
    forced = {"FORCE_COLOR": "1", "COLUMNS": "30", "TERM": "xterm-256color"}
    result = run("tokenize", "the cat sat on the mat 猫 " * 3, "-v", small, env=forced)
    assert ANSI.search(result.stdout)
    lines = plain(result.stdout).splitlines()
    ids = TOKENIZER.encode("the cat sat on the mat 猫 " * 3)
    assert [int(token) for line in lines[2::2] for token in line.split()] == ids
    assert max(map(len, lines[2::2])) <= 31 and f"{len(ids)} tokens of 300" in lines[0]
    for above, below in zip(lines[1::2], lines[2::2], strict=True):  # a piece stands above its id
        starts = {match.start() for match in re.finditer(r"\S+", below)}
        assert all(above[start : start + 1].strip() for start in starts if "猫" not in above)


# --- inspect ------------------------------------------------------------------------------------------------


def test_a_file_is_counted_as_gguf_counts_it(small):
    from gguf import GGUFReader

    reader = GGUFReader(small)
    result = run("inspect", small)
    assert result.exit_code == 0 and not ANSI.search(result.stdout)
    lines = result.stdout.splitlines()
    for tensor in reader.tensors:
        (row,) = [line.split() for line in lines if line.startswith(f"{tensor.name} ")]
        assert row[-3:-1] == [tensor.tensor_type.name, f"{tensor.n_bytes:,}"]
        assert " ".join(row[1:-3]) == " × ".join(str(size) for size in reversed(tensor.shape.tolist()))
    total = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    row = lines[-1].split()
    assert row == [
        "all",
        str(len(reader.tensors)),
        f"{weights:,}",
        f"{total:,}",
        f"{8 * total / weights:.2f}",
    ]
    (half,) = [line.split() for line in lines if line.startswith("F16 ")]
    assert half[1:] == ["1", "480", "960", f"{960 / total:.1%}", "16.00"]
    assert "small \ufffd[31m[bold]one[/bold] xxx" in result.stdout and "x" * 60 not in result.stdout
    short = run("inspect", small, "--no-metadata", "--no-tensors").stdout.splitlines()
    assert len(short) == 5 and short[-1] == lines[-1]


def test_damaged_files_give_one_error_or_a_table(small, tmp_path):
    whole, path, random, refused = small.read_bytes(), tmp_path / "model.gguf", Random(0), 0
    for _ in range(60):
        data = bytearray(whole[: random.choice((len(whole), random.randrange(len(whole))))])
        for _ in range(random.randrange(4)):
            data[random.randrange(min(len(data), 700))] = random.choice((0, 255, random.randrange(256)))
        path.write_bytes(data)
        result = run("inspect", path)
        if result.exit_code:
            one_error(result, "is not a GGUF file that can be read")
            refused += 1
    assert 20 < refused < 60


# --- In a process of its own --------------------------------------------------------------------------------


def test_a_process_writes_answers_and_obeys_ctrl_c(small):
    command = [sys.executable, "-m", "companion", "chat", "--model", str(small), "--max-tokens", "4"]
    environment = os.environ | {"PYTHONUTF8": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        process.stdin.write(b"the cat\n")
        process.stdin.flush()
        wanted = LocalChatModel.from_gguf(small).complete([Message("user", "the cat")], max_tokens=4)
        assert process.stdout.read(len(wanted.encode()) + 1).decode() == wanted + "\n"
        speed = process.stderr.readline().decode()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, b"", b"")
    assert re.fullmatch(r"4 tokens, the first after [^\n]*; cut off at --max-tokens\n", speed)


def test_without_typer_one_line_says_what_to_install():
    code = (
        "import sys, runpy; sys.modules['typer'] = None; runpy.run_module('companion', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "The command line needs typer: install the extra `app` (pip install '.[app]').\n"
