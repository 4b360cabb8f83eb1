"""What users get wrong, in every command: the exit code, one sentence, and no file of weights opened for it."""

import json
import re
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from commands import run
from safetensors_files import write_safetensors

import mlx_dgemma
from mlx_dgemma import engine
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import main
from mlx_dgemma.prompt.opened import Opened

TROUBLE = Path(__file__).parent.parent.parent / "docs" / "troubleshooting.md"
opened_files: list[str] = []  # every file of weights that Python or MLX opens


def note_weights(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".safetensors"):
        opened_files.append(str(arguments[0]))


sys.addaudithook(note_weights)


@pytest.fixture
def weights(monkeypatch):
    """The files of weights that were opened. The tokenizer is read once for all tests."""
    real = mx.load
    monkeypatch.setattr(mx, "load", lambda file, *a, **k: opened_files.append(str(file)) or real(file, *a, **k))
    monkeypatch.setattr(
        Opened, "of", lambda name=None, adapter=None: demo_opened() if name is None else open_really(name)
    )
    opened_files.clear()
    return opened_files


open_really = Opened.of
demo_opened = cache(open_really)


@pytest.fixture
def folder(tmp_path, monkeypatch, red):
    """A working folder with what the mistakes name; no program of a clipboard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, text in (
        ("a.txt", "The cat sat."),
        ("empty.txt", " \n"),
        ("bad.png", "no picture"),
        ("broken.json", "[1"),
        ("list.json", "[1]"),
        ("deep.json", "[" * 10**5),
        ("deep.yaml", "[" * 600),
        ("open.json", '{"type": "nonsense"}'),
        ("data.jsonl", '{"prompt": "Spell the word cat.", "completion": "c a t"}\n'),
        ("tune.yaml", "rnak: 3"),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "full" / "notes").mkdir(parents=True)
    return tmp_path


LOOK = ("generate", "x", "--image")
MISTAKES = [
    # generate: the prompt
    (["generate"], 2, "There is no prompt: give it as an argument, with --file, or on stdin."),
    (["generate", " "], 1, "The prompt is empty; say what you want."),
    (["generate", "one", "two"], 2, "Got unexpected extra argument (two)"),
    (["generate", "x", "--nonsense"], 2, "No such option '--nonsense'"),
    (["generate", "x", "-f", "none.txt"], 2, "'--file': File 'none.txt' does not exist."),
    (["generate", "-f", "-", "-"], 2, "- is given twice, but stdin can be read once."),
    (["generate", "-f", "bad.bin"], 2, "'--file': File 'bad.bin' does not exist."),
    # pictures and videos
    ([*LOOK, "none.png"], 2, "'--image': File 'none.png' does not exist."),
    ([*LOOK, "bad.png"], 1, "bad.png"),
    ([*LOOK, "https://example.com/a.png"], 2, "is a web address; download the file and give its path."),
    ([*LOOK, "red.png", "--image-tokens", 100], 2, "--image-tokens is 100; it should be one of 70, 140,"),
    (["generate", "x", "--image-tokens", 100], 2, "--image-tokens is 100; it should be one of 70, 140,"),
    (["generate", "x", "--video", "none.mp4"], 2, "'--video': Path 'none.mp4' does not exist."),
    (["generate", "x", "--video", "bad.png"], 1, "bad.png"),
    (["generate", "x", "--video", ".", "--fps", 0], 2, "--fps is 0.0; it should be above 0."),
    # forms of the answer
    (["generate", "x", "--tools", "none.json"], 2, "'--tools': File 'none.json' does not exist."),
    (["generate", "x", "--tools", "broken.json"], 1, "broken.json is not JSON"),
    (["generate", "x", "--tools", "list.json"], 1, "list.json has no function declaration at position 0"),
    (["generate", "x", "--tools", "deep.json"], 1, "deep.json is not JSON (maximum recursion depth"),
    (["generate", "x", "--schema", "deep.json"], 1, "deep.json is not JSON (maximum recursion depth"),
    (["generate", "x", "--schema", "none.json"], 2, "'--schema': File 'none.json' does not exist."),
    (["generate", "x", "--schema", "broken.json"], 1, "broken.json is not JSON"),
    (["generate", "x", "--schema", "list.json"], 1, "list.json holds list; give a JSON Schema"),
    (["generate", "x", "--schema", "{"], 2, "--schema is not JSON"),
    (["generate", "x", "--schema", "open.json"], 2, "--schema at "),
    (["generate", "x", "--regex", "("], 2, "--regex '(' is not a regular expression"),
    (["generate", "x", "--regex", "(?<=a)b"], 2, "--regex '(?<=a)b' has "),
    (["generate", "x", "--regex", ".*"], 2, "--regex '.*' matches every line of text"),
    (["generate", "x", "--regex", "a", "--schema", "{}"], 2, "Both --schema and --regex are given; leave one out."),
    (["generate", "x", "--regex", "a", "--exact"], 2, "--regex is given and --exact is given; they cannot be together"),
    (["generate", "x", "--regex", "a{9}", "--max-tokens", 1], 2, "but --max-tokens is 1; raise it."),
    # options
    (["generate", "x", "--exact", "--fast"], 2, "--exact is given and --fast is given; the reference knows no"),
    (["generate", "x", "--t-min", 0.9, "--t-max", 0.1], 2, "--t-max is 0.1; it should be a number, at least --t-min ="),
    (["generate", "x", "--t-max", 0, "--t-min", 0], 2, "--t-max is 0.0; it should be above 0."),
    (["generate", "x", "--entropy-bound", "nan"], 2, "--entropy-bound is nan; it should be a number, at least 0."),
    (["generate", "x", "--fast", "--entropy-bound", 0.3], 2, "--fast is given and --entropy-bound is 0.3; fast mode"),
    (["generate", "x", "--temperature", 0.5], 2, "--temperature is 0.5, but the mode is diffusion"),
    (["generate", "x", "--mode", "causal", "--fast"], 2, "--mode is 'causal' and --fast is given"),
    (["generate", "x", "--mode", "causal", "--top-p", 2], 2, "--top-p is 2.0; it should be a number from 0 to 1."),
    (["generate", "x", "--mode", "quick"], 2, "'--mode': 'quick' is not one of"),
    (["generate", "x", "--max-tokens", 0], 2, "'--max-tokens': 0 is not in the range x>=1."),
    (["generate", "x", "--max-tokens", "1k"], 2, "'--max-tokens': '1k' is not a valid whole number."),
    (["generate", "x", "--seed", -1], 2, "'--seed': -1 is not in the range x>=0."),
    (["generate", "x", "--seed", 2**64], 2, f"--seed is {2**64}; it should be a whole number"),
    (["generate", "x", "--stop", ""], 2, "--stop is ('',); it should be strings that are not empty."),
    (["generate", "x", "--dtype", "int8"], 2, "'--dtype': 'int8' is not one of"),
    (["generate", "x", "--kv-bits", 5], 2, "'--kv-bits': '5' is not one of '8', '4'."),
    # where it comes from and where it goes
    (["generate", "x", "-m", "./none"], 1, "./none does not exist; give a folder or a Hub id"),
    (["generate", "x", "-m", "a.txt"], 1, "a.txt is not a folder; point at the folder that holds config.json."),
    (["generate", "x", "--adapter", "./none"], 1, "./none does not exist"),
    (["generate", "x", "--output", "none/a.txt"], 2, "'--output': The folder none does not exist; make it first."),
    (["generate", "x", "--output", "."], 2, "'--output': File '.' is a directory."),
    (["generate", "x", "--output", "/dev/null"], 2, "/dev/null is no regular file; name one, or leave it out"),
    (["generate", "x", "--copy"], 1, "--copy finds no clipboard: there is no pbcopy, wl-copy or xclip here"),
    # chat
    (["chat", "--exact", "--fast"], 2, "--exact is given and --fast is given"),
    (["chat", "--image", "-"], 2, "- is stdin, which holds the conversation; name the picture's file."),
    # infill
    (["infill"], 2, "Give the text in one way: as FILE, or with --prefix-file and --suffix-file."),
    (["infill", "a.txt", "--prefix-file", "a.txt"], 2, "Give the text in one way"),
    (["infill", "--prefix-file", "-", "--suffix-file", "-"], 2, "- is given twice, but stdin can be read once."),
    (["infill", "a.txt"], 2, "a.txt has the mark <HOLE> 0 times; mark one hole, or use --at."),
    (["infill", "a.txt", "--at", "0:0"], 2, "--at is '0:0'; it should be LINE:COLUMN, both counted from 1."),
    (["infill", "a.txt", "--at", "9:1"], 2, "--at is '9:1', but a.txt has no such place; it has 1 lines."),
    (["infill", "a.txt", "--mark", "cat", "--at", "1:4"], 2, "--at and --mark are two ways to say where the hole is"),
    (["infill", "a.txt", "--mark", ""], 2, "--mark is empty; give the text that stands where the hole is."),
    (["infill", "a.txt", "--at", "1:4", "--length", 0], 2, "'--length': 0 is not in the range x>=1."),
    (
        ["infill", "a.txt", "--at", "1:4", "--patience", 1, "--mode", "causal"],
        2,
        "--mode is 'causal' and --patience is",
    ),
    # continue
    (["continue", "none.txt"], 2, "'[FILE]': File 'none.txt' does not exist."),
    (["continue"], 1, "stdin is empty; there is nothing to continue."),
    (["continue", "a.txt", "--mode", "causal", "--patience", 1], 2, "--mode is 'causal' and --patience is"),
    # edit
    (["edit"], 2, "Missing argument 'INSTRUCTION'."),
    (["edit", " ", "a.txt"], 2, "INSTRUCTION is empty; say what is to be done with the text."),
    (["edit", "x", "none.txt"], 2, "'[FILE]': File 'none.txt' does not exist."),
    (["edit", "x", "empty.txt"], 1, "empty.txt is empty; there is nothing to edit."),
    (["edit", "x"], 1, "stdin is empty; there is nothing to edit."),
    (["edit", "x", "-i"], 2, "--in-place needs a FILE to write to."),
    (["edit", "x", "a.txt", "-i", "--diff"], 2, "--in-place prints nothing; leave out --diff, --json and --output."),
    (["edit", "x", "a.txt", "--diff", "--json"], 2, "--diff and --json are two ways to print; give one."),
    (["edit", "x", "a.txt", "--strength", 2], 2, "'--strength': 2.0 is not in the range 0<=x<=1."),
    (["edit", "x", "a.txt", "--t-max", 0.1], 2, "--t-max is 0.1; it should be a number, at least --t-min = 0.4."),
    # choose
    (["choose", "x"], 2, "Give the labels in one way: as arguments, with --range, with --bool or with --ask."),
    (["choose", "x", "a"], 2, "The label 'a' stands alone, so it is always certain; give at least two."),
    (["choose", "x", "a", "a"], 2, "The label 'a' is given 2 times; give every label once."),
    (["choose", "x", "--range", 3, 1], 2, "--range is 3 1; give the lower number first."),
    (["choose", "x", "a", "b", "--answer", "It is."], 2, "--answer 'It is.' has 0 slots {}; give it one."),
    (["choose", " ", "a"], 1, "The prompt is empty; say what you want."),
    (["choose", "x", "a", "b", "--image", "bad.png"], 1, "bad.png"),
    # serve and launch
    (["serve", "--host", "0.0.0.0"], 2, "--host is 0.0.0.0, which other machines can reach: give an API key"),
    (["serve", "--port", 99999], 2, "'--port': 99999 is not in the range"),
    (["serve", "--cache-size", 0, "--cache-dir", "."], 2, "--cache-size is 0, so --cache-dir would hold nothing"),
    (["serve", "--install", "--uninstall"], 2, "--install and --uninstall are two things to do; give one."),
    (["serve", "--cors-origin", "here"], 2, "--cors-origin is 'here'; it should be like http://localhost:3000"),
    (["launch", "nobody"], 2, "'nobody' is not one of 'claude',"),
    # tune, evaluate, fuse
    (["tune", "none.jsonl"], 1, "none.jsonl does not exist"),
    (["tune", "data.jsonl", "--kv-bits", 8], 2, "--kv-bits is for answers, and training does not quantize the prefix"),
    (["distill", "a.txt", "--output", "out", "--kv-bits", 8], 2, "--kv-bits is for answers, and training does not"),
    (["tune", "data.jsonl", "--rank", 0], 2, "'--rank': 0 is not in the range x>=1."),
    (["tune", "data.jsonl", "--steps", 3, "--warmup", 3], 2, "--warmup is 3; it should be below the 3 steps."),
    (["tune", "data.jsonl", "--dropout", 0.1], 2, "--dropout is 0.1, but recomputed layers would draw it again; add"),
    (["tune", "data.jsonl", "--config", "tune.yaml"], 1, "tune.yaml sets rnak, which is no option of tune"),
    (["tune", "data.jsonl", "--config", "deep.yaml"], 1, "deep.yaml is not valid YAML (maximum recursion depth"),
    (
        ["tune", "data.jsonl", "--output", "full"],
        1,
        "full is not empty; give another --output, or continue its run with",
    ),
    (["tune", "data.jsonl", "--layers", 99], 2, "--layers is 99; the model has "),
    (["tune", "data.jsonl", "--fill", 10**6], 2, "--fill is 1000000; it should be a token id below 2048."),
    (
        ["tune", "data.jsonl", "--kind", "dora", "--targets", "experts"],
        2,
        "DoRA does not support experts; leave experts",
    ),
    (["evaluate", "./none"], 1, "./none does not exist"),
    (["evaluate", "data.jsonl", "--metric", "equal"], 2, "--metric is 'equal'; it should be exact, contains, regex"),
    (["evaluate", "data.jsonl", "--exact", "--fast"], 2, "--exact is given and --fast is given"),
    (["evaluate", "data.jsonl", "--split", "test"], 2, "--split test names a file of a folder, but data.jsonl is a"),
    (["evaluate", "data.jsonl", "--html", "a.html"], 2, "--html is of a comparison; give --against, or leave it out."),
    (["evaluate", "data.jsonl", "--output", "a.txt"], 1, "a.txt exists already; give another name, or remove it."),
    (
        ["evaluate", "data.jsonl", "--output", "none/a"],
        1,
        "none/a cannot be used (No such file or directory); mend that",
    ),
    (["fuse", "out"], 2, "Missing option '--adapter'."),
    (["fuse", "out", "--adapter", "./none"], 1, "./none does not exist"),
    (["fuse", "a.txt", "--adapter", "./none"], 1, "a.txt exists; delete it or choose another OUT."),
    # info, check, convert, and no command at all
    (["info", "a", "--model", "b"], 2, "MODEL is a and --model is b; leave one out."),
    (["info", "--model", "./none"], 1, "./none does not exist"),
    (["info", "--context", 0], 2, "'--context': 0 is not in the range x>=1."),
    (["check", "--section", "weather"], 2, "'--section': 'weather' is not one of"),
    (["distill"], 2, "Missing argument 'PROMPTS'."),
    (["distill", "a.txt", "--output", "out", "--rounds", 0], 2, "'--rounds': 0 is not in the range x>=1."),
    (["distill", "empty.txt", "--output", "out"], 1, "empty.txt contains no prompts; write one a line."),
    (["distill", "a.txt", "--output", "out", "--layers", 99], 2, "--layers is 99; the model has "),
    (["calibrate", "none.txt", "--dry-run"], 1, "none.txt cannot be read: No such file or directory."),
    (["calibrate", "a.txt"], 2, "The bundled demo is part of the package; give an --adapter"),
    (["setup", "--recipe", "5bit"], 2, "--recipe is '5bit'; take one of 3bit,"),
    (["quick-actions", "install", "nothing"], 2, "There is no action 'nothing'; give of rewrite,"),
    (["shortcut", "--nothing"], 2, "No such option '--nothing'."),
    (["convert"], 2, "Give one checkpoint: --hf-path or the argument SOURCE."),
    (["convert", "./none"], 1, "./none does not exist"),
    (["convert", "./none", "--recipe", "5bit"], 2, "--recipe is '5bit'; take one of 3bit,"),
    (["convert", "./none", "-q", "--q-bits", 9], 2, "--q-bits is 9; with affine it should be"),
    (["genrate", "x"], 2, "No such command 'genrate'"),
]


def of_usage(code, stderr):
    """The sentence of a mistake; wrong usage has the command's usage before it."""
    *before, last = stderr.splitlines()
    assert [line.partition(" ")[0] for line in before] == ([] if code == 1 else ["Usage:", "Try", ""]), stderr
    return last


@pytest.mark.parametrize(("arguments", "code", "said"), MISTAKES, ids=lambda one: None)
def test_a_mistake_is_one_sentence_and_opens_no_weights(arguments, code, said, folder, weights):
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    told = of_usage(code, done.stderr)
    assert told.startswith("Error: ") and said in told
    assert "[Errno" not in told
    assert weights == []
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_there_are_mistakes_in_every_command():
    assert len(MISTAKES) >= 60
    assert {arguments[0] for arguments, _, _ in MISTAKES} == {*main.COMMANDS, "genrate"}


def test_opened_weights_are_counted(folder, weights):
    write_safetensors(folder / "a.safetensors", {"a": ("F32", [1], bytes(4))})
    weights.clear()
    assert run("info").exit_code == 0
    assert weights == [str(DEMO / "model.safetensors")]
    mlx_dgemma.load(DEMO)
    assert weights.count(str(DEMO / "model.safetensors")) > 2


PROJECTION = "base_model.model.model.decoder.layers.0.self_attn.q_proj"
WRONG_ADAPTERS = {  # changes of a right adapter for the demo: configuration, and shapes of its two tensors
    "another rank": ({"r": 3}, {}, "The adapter has another rank than adapter_config.json says: its "),
    "another model": ({}, {"lora_A": [2, 7]}, "The adapter belongs to another model: its "),
    "no such layer": ({"layer": "99"}, {}, "The adapter belongs to another model: this model has no "),
    "a part is missing": ({}, {"lora_B": None}, "but its lora_B is missing; save it again."),
    "not targeted": ({"target_modules": ["k_proj"]}, {}, "which adapter_config.json does not target"),
    "not of PEFT": ({"peft_type": "IA3"}, {}, "peft_type"),
}


@pytest.mark.parametrize("wrong", [None, *WRONG_ADAPTERS])
def test_a_wrong_adapter_is_told_before_the_weights(folder, weights, wrong):
    changed, shapes, said = WRONG_ADAPTERS.get(wrong, ({}, {}, ""))
    changed = dict(changed)
    outputs, inputs = mlx_dgemma.engine.Checkpoint.open(DEMO).shapes["model.decoder.layers.0.self_attn.q_proj.weight"]
    name = PROJECTION.replace("0", changed.pop("layer", "0"))
    sizes = {"lora_A": [2, inputs], "lora_B": [outputs, 2], **shapes}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **changed}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"{name}.{part}.weight": ("F32", size, bytes(4 * size[0] * size[1])) for part, size in sizes.items() if size
    }
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    weights.clear()
    done = run("generate", "x", "--adapter", str(folder), *([] if wrong else ["--max-denoising-steps", "1"]))
    if wrong is None:
        assert done.exit_code == 0, done.stderr
        return
    assert (done.exit_code, done.stdout) == (1, "")
    assert said in of_usage(1, done.stderr)
    assert set(weights) <= {str(folder / "adapter_model.safetensors")}


def test_a_missing_extra_is_told_before_the_weights(folder, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    (folder / "clip.mp4").write_bytes(bytes(8))
    for arguments, said in (
        (["generate", "x", "--video", "clip.mp4"], "Video files need a decoder"),
        (["serve"], "serve needs the package uvicorn"),
    ):
        done = run(*arguments)
        assert (done.exit_code, done.stdout, weights) == (1, "", [])
        assert said in of_usage(1, done.stderr)


def rows_of_codes():
    """(code, command) of every example in the table of exit codes."""
    part = TROUBLE.read_text().partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (\d+) \|(.*)\|$", part, re.MULTILINE):
        yield from ((int(row[0]), command) for command in re.findall(r"`mlx-dgemma ([^`]*)`", row[1]))


def test_the_table_of_exit_codes_holds(folder, weights):
    rows = list(rows_of_codes())
    assert {code for code, _ in rows} == {0, 1, 2}
    for code, command in rows:
        found = [one.strip('"') for one in re.findall(r'"[^"]*"|\S+', command)]
        done = run(*found)
        assert done.exit_code == code, (command, done.stderr)


LOADING = "generate x|chat|infill a.txt --at 1:4|continue a.txt|edit x a.txt|choose x a b|tune data.jsonl --output out"
LOADING += "|evaluate data.jsonl|serve --port 0"


@pytest.mark.parametrize("command", LOADING.split("|"))
def test_an_interrupt_exits_with_130_and_leaves_files_alone(command, folder, weights, monkeypatch):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "load", load)
    before = sorted(folder.iterdir())
    done = run(*command.split())
    assert (done.exit_code, done.stdout) == (130, ""), done.stderr
    assert sorted(folder.iterdir()) == before
