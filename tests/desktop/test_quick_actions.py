"""Quick Actions: their property lists, and their shell part in a stubbed GUI session.

Nothing here was run on a Mac: osascript and pbcopy are stand-ins, Automator and the Services menu are not there.
"""

import os
import plistlib
import shutil
import subprocess
import sys
from functools import partial

import pytest
from click.testing import CliRunner

from mlx_dgemma.cli.main import main
from mlx_dgemma.desktop import quick_actions
from mlx_dgemma.desktop.actions import ACTIONS, Action, read_actions
from mlx_dgemma.desktop.shell import script
from mlx_dgemma.desktop.workflow import MARK
from mlx_dgemma.errors import DgemmaError

# Apple, Services Implementation Guide, "Services Properties", and the page of NSServices in Bundle Resources.
SERVICE_KEYS = {
    "NSMessage", "NSPortName", "NSMenuItem", "NSSendTypes", "NSReturnTypes", "NSSendFileTypes", "NSRequiredContext",
    "NSKeyEquivalent", "NSUserData", "NSTimeout", "NSServiceDescription",
}  # fmt: skip
SYSTEM_TYPES = {"public.utf8-plain-text", "public.image", "public.item"}  # Apple, System-declared type identifiers
SHELLS = [one for one in ("bash", "zsh", "dash") if shutil.which(one)]
BY_KEY = {action.key: action for action in ACTIONS}


@pytest.fixture(autouse=True)
def system(monkeypatch):
    """No test tells a Mac's own list of services about its workflows."""
    monkeypatch.setattr(quick_actions.platform, "system", lambda: "Linux")
    return monkeypatch


def parts(bundle):
    info = plistlib.loads((bundle / "Contents" / "Info.plist").read_bytes())
    document = plistlib.loads((bundle / "Contents" / "document.wflow").read_bytes())
    return info, document["actions"][0]["action"]["ActionParameters"], document["workflowMetaData"]


def test_property_lists_have_apples_keys_and_types(tmp_path):
    assert len(quick_actions.install(ACTIONS, tmp_path)) == len(ACTIONS)
    for action in ACTIONS:
        bundle = tmp_path / f"{action.title}.workflow"
        assert sorted(one.name for one in bundle.rglob("*")) == ["Contents", "Info.plist", "document.wflow"]
        info, parameters, meta = parts(bundle)
        (service,) = info["NSServices"]
        assert service.keys() <= SERVICE_KEYS
        assert (service["NSMessage"], service["NSMenuItem"]) == ("runWorkflowAsService", {"default": action.title})
        types = [service.get(name, []) for name in ("NSSendTypes", "NSReturnTypes", "NSSendFileTypes")]
        assert {one for some in types for one in some} <= SYSTEM_TYPES
        text, replaces = action.input == "text", action.output == "replace"
        assert [bool(some) for some in types] == [text, replaces, not text]
        assert meta["workflowTypeIdentifier"] == "com.apple.Automator.servicesMenu"
        assert meta["serviceInputTypeIdentifier"].endswith("Automator.text") == text
        assert meta["serviceOutputTypeIdentifier"] == f"com.apple.Automator.{'text' if replaces else 'nothing'}"
        assert (parameters["inputMethod"], parameters["shell"]) == (0 if text else 1, "/bin/bash")
        assert ("serviceApplicationBundleID" in meta) == (not text) == bool(service["NSRequiredContext"])


ANSWERING = """#!/bin/sh
for one; do printf '%s\\n' "$one" >> "$STUBS/arguments"; done
cat > "$STUBS/input"
test -z "$FAILS" || { printf 'half an ans'; printf 'Warning: x\\nError: It is broken.\\n' >&2; exit "$FAILS"; }
printf '%s' "$ANSWER"
"""
OSASCRIPT = """#!/bin/sh
for last; do :; done
case "$*" in *"display dialog"*) test -n "$QUESTION" || exit 1; printf '%s\\n' "$QUESTION"; exit;; esac
printf '%s\\n' "$last" >> "$STUBS/notifications"
"""


class Session:
    """A GUI session: PATH of the system behind stand-ins for osascript and pbcopy, and neither HOME nor a locale."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in (
            ("model", ANSWERING),
            ("osascript", OSASCRIPT),
            ("pbcopy", '#!/bin/sh\ncat > "$STUBS/clipboard"\n'),
        ):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "clipboard").write_text("precious")

    def run(self, shell, action, selection=b"", files=(), program=None, **variables):
        """What the script prints; the program's words hold a space and a quote."""
        text = script(
            action, program or [str(self.folder / "model"), "it's", "a b"], {"HF_HOME": "/a b/it's"}, "me/model"
        )
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "STUBS": str(self.folder), **variables}
        done = subprocess.run(
            [shell, "-c", text, shell, *files],
            input=selection,
            env=environment,
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    def read(self, name):
        file = self.folder / name
        return file.read_bytes() if file.exists() else None


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path)


SELECTIONS = ['it\'s "quoted" $HOME `x` \\n %s', "two\nlines\n\n", "\U0001f986 ü 漢字\n", "é" * 50_000, "-n", " \t"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_selection_is_replaced_by_a_whole_answer_and_comes_back_unchanged_otherwise(shell, session):
    for text in SELECTIONS:
        selection = text.encode()
        printed = session.run(shell, BY_KEY["grammar"], selection, ANSWER="new\n'\"\U0001f986\n")
        assert printed == "new\n'\"\U0001f986\n".encode()
        assert session.read("input") == selection
        assert session.run(shell, BY_KEY["grammar"], selection, FAILS="1") == selection
        assert session.run(shell, BY_KEY["grammar"], selection, ANSWER="") == selection
        assert session.run(shell, BY_KEY["grammar"], selection, program=["/no/such program"]) == selection
    assert session.read("arguments").decode().splitlines()[:11] == [
        "it's", "a b", "quick-actions", "run", "--verb", "edit", "--model", "me/model", "--instruction",
        BY_KEY["grammar"].instruction, "it's",
    ]  # fmt: skip
    told = session.read("notifications").decode().splitlines()
    assert told[:4] == ["Working on it.", "The text was replaced.", "Working on it.", "Error: It is broken."]
    assert "such program" in told[7]
    assert session.read("clipboard") == b"precious"


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_selected_is_told_and_nothing_is_asked(shell, session):
    assert session.run(shell, BY_KEY["rewrite"]) == b""
    assert session.run(shell, BY_KEY["describe"]) == b""
    assert session.read("notifications") == b"No text is selected.\nNo file is selected.\n"
    assert session.read("input") is None


@pytest.mark.parametrize("shell", SHELLS)
def test_the_clipboard_is_written_with_a_whole_answer_alone(shell, session):
    assert session.run(shell, BY_KEY["explain"], b"what", FAILS="3") == b""
    assert session.run(shell, BY_KEY["explain"], b"what", program=["/nowhere"]) == b""
    assert session.read("clipboard") == b"precious"
    assert session.run(shell, BY_KEY["explain"], b"what", ANSWER="because \U0001f986\n") == b""
    assert session.read("clipboard") == "because \U0001f986\n".encode()
    files = ["/a b.png", "/it's.png", "-x"]
    assert session.run(shell, BY_KEY["describe"], files=files, ANSWER="a duck") == b""
    assert session.read("clipboard") == b"a duck"
    assert session.read("arguments").decode().splitlines()[-4:] == ["--", *files]
    session.run(shell, BY_KEY["ask"], files=["/a.txt"], ANSWER="not asked")
    assert session.read("clipboard") == b"a duck"  # the dialog was cancelled
    session.run(shell, BY_KEY["ask"], files=["/a.txt"], ANSWER="asked", QUESTION='who\'s "that"?')
    assert session.read("clipboard") == b"asked"
    assert session.read("arguments").decode().splitlines()[-3:] == ['who\'s "that"?', "--", "/a.txt"]


def test_a_workflow_rewrites_with_the_real_command(session, tmp_path, monkeypatch):
    """The installed script of the bundle, the bundled demo, and an own action."""
    own = tmp_path / "own.yaml"
    own.write_text("- title: Cats to dogs\n  instruction: Replace cat with dog\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    where = str(tmp_path / "Services")
    done = CliRunner().invoke(
        main, ["quick-actions", "install", "cats-to-dogs", "--actions", str(own), "--folder", where]
    )
    assert done.exit_code == 0, done.output
    _, parameters, _ = parts(tmp_path / "Services" / "Cats to dogs.workflow")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STUBS": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    text = "The cat saw a cat in the barn."
    done = subprocess.run(
        ["/bin/bash", "-c", parameters["COMMAND_STRING"]],
        input=text,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("The dog saw a dog in the barn.", "")


def test_only_own_bundles_are_listed_replaced_and_removed(tmp_path):
    foreign = tmp_path / f"{BY_KEY['explain'].title}.workflow"
    shutil.copytree(quick_actions.install([BY_KEY["explain"]], tmp_path / "elsewhere")[0], foreign)
    info = foreign / "Contents" / "Info.plist"
    info.write_bytes(info.read_bytes().replace(MARK.encode(), b"com.apple.Automator."))
    (tmp_path / "Broken.workflow").mkdir()
    with pytest.raises(DgemmaError, match=r"is not of mlx-dgemma; rename it"):
        quick_actions.install(ACTIONS, tmp_path)
    assert quick_actions.installed(tmp_path) == []
    quick_actions.install([BY_KEY["rewrite"], BY_KEY["grammar"]], tmp_path)
    quick_actions.install([Action("grammar", "Other Title", "Fix it.")], tmp_path)
    assert [(one.key, one.title) for one in quick_actions.installed(tmp_path)] == [
        ("grammar", "Other Title"),
        ("rewrite", BY_KEY["rewrite"].title),
    ]
    listed = CliRunner().invoke(main, ["quick-actions", "list", "--folder", str(tmp_path)]).stdout
    assert f"grammar\tOther Title\t{tmp_path}/Other Title.workflow\n" in listed
    with pytest.raises(DgemmaError, match=r"has no Quick Action explain of mlx-dgemma"):
        quick_actions.uninstall(tmp_path, ["explain"])
    before = sorted(tmp_path.iterdir())
    assert len(quick_actions.uninstall(tmp_path, dry_run=True)) == 2
    assert sorted(tmp_path.iterdir()) == before
    assert CliRunner().invoke(main, ["quick-actions", "uninstall", "--folder", str(tmp_path)]).exit_code == 0
    assert sorted(one.name for one in tmp_path.glob("*.workflow")) == ["Broken.workflow", foreign.name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: b", "it should be a list of actions"),
        ("- title: A", "has an action without instruction"),
        ("- {title: A/B, instruction: x}", "a short line without"),
        ("- {title: A, instruction: x, inpt: text}", "the field 'inpt'; it should be one of key"),
        ("- {title: A, instruction: x, input: text, output: file}", "output 'file'; it should be one of replace"),
        ("- {title: A, instruction: x, input: files, output: replace}", "its output should be clipboard"),
        ("- {title: A, instruction: x, strength: 2}", "strength 2; it should be from 0 to 1"),
        ("- [", "is not valid YAML"),
        ("[" * 600, "is not valid YAML"),
        ("- {title: A b, instruction: x}\n- {title: A-b, instruction: y}", "several actions with the key a-b;"),
        (f"- {{title: {chr(0x1F986) * 60}, instruction: x}}", "a short line without"),
        ('- {title: "A \\ud83e", instruction: x}', "a short line without"),
        ('- {title: A, instruction: "x \\0"}', "has '\\x00' in its instruction, which no property list can hold"),
    ],
)
def test_own_actions_are_checked(tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(DgemmaError) as refused:
        read_actions(tmp_path / "own.yaml")
    assert said in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_any_title_has_a_key(tmp_path):
    titles = ["Größer", "Сделай формальным", "丁寧に", "🦆"]
    (tmp_path / "own.yaml").write_text("".join(f"- {{title: {one}, instruction: x}}\n" for one in titles))
    found = read_actions(tmp_path / "own.yaml")
    assert ([one.title for one in found], found[0].key, len({one.key for one in found})) == (titles, "groer", 4)
    assert {one.title for one in quick_actions.installed(quick_actions.install(found, tmp_path)[0].parent)} == {*titles}


def test_macos_reads_its_services_again(tmp_path, system):
    system.setattr(quick_actions.platform, "system", lambda: "Darwin")
    ran = []
    quick_actions.install([BY_KEY["rewrite"]], tmp_path, run=lambda command, **_: ran.append(command))
    quick_actions.uninstall(tmp_path, run=lambda command, **_: ran.append(command))
    assert ran == [["/System/Library/CoreServices/pbs", "-update"]] * 2
    quick_actions.install([BY_KEY["grammar"]], tmp_path, run=partial(subprocess.run, cwd=tmp_path / "no folder"))
    assert [one.key for one in quick_actions.installed(tmp_path)] == ["grammar"]
    system.setenv("HOME", str(tmp_path))
    assert quick_actions.services_folder() == tmp_path / "Library" / "Services"


def test_without_macos_a_folder_must_be_given():
    done = CliRunner().invoke(main, ["quick-actions", "install"])
    assert (done.exit_code, done.stderr.splitlines()[-1] + "\n") == (
        2,
        "Error: Quick Actions are macOS's, and this is Linux; --folder writes them elsewhere.\n",
    )
