"""Lines of the check, the report that they make, and the command's exit codes. No time is asserted."""

import json

import pytest
from commands import python, run

from mlx_dgemma.check import report
from mlx_dgemma.check.lines import FAILED, PASSED, SKIPPED, WARNING, Line, attempt, judged
from mlx_dgemma.check.report import Section
from mlx_dgemma.cli.commands.check import SECTIONS


def broken():
    raise RuntimeError("Unable to load\nkernel")


def failing_section():
    yield Line("one", PASSED)
    broken()


@pytest.fixture
def sections(monkeypatch):
    """The check consists of these sections; the function sets them."""

    def set_to(*found):
        monkeypatch.setattr(
            report, "sections", lambda quick, only: [Section(name, lambda a=lines: iter(a)) for name, lines in found]
        )

    return set_to


def test_what_a_line_raises_is_its_text():
    assert attempt("sort", broken) == Line("sort", FAILED, "RuntimeError: Unable to load kernel")
    assert attempt("sort", lambda: judged("sort", True, "fine", error=1)) == Line("sort", PASSED, "fine", {"error": 1})
    assert str(judged("sort", False, "off by 2")) == "failed   sort: off by 2"


def test_a_section_that_fails_is_a_line_and_the_next_one_follows():
    found = list(
        report.run([Section("first", failing_section), Section("second", lambda: iter([Line("two", PASSED)]))])
    )
    assert [(one.section, one.line.name, one.line.status) for one in found] == [
        ("first", "one", PASSED),
        ("first", "first", FAILED),
        ("second", "two", PASSED),
    ]
    assert found[1].line.says == "RuntimeError: Unable to load kernel"


def test_the_last_line_is_json_and_the_exit_code_tells_of_failures(sections):
    sections(("a", [Line("x", PASSED, "", {"error": float("inf")}), Line("y", WARNING), Line("z", SKIPPED, "no GPU")]))
    done = run("check")
    assert done.exit_code == 0
    *text, last = done.stdout.splitlines()
    made = json.loads(last)
    assert set(made) == {
        "check", "version", "mlx", "device", "backend", "passed", "counts", "seconds", "lines", "verdict",
    }  # fmt: skip
    assert made["passed"] is True and made["counts"] == {"passed": 1, "warning": 1, "failed": 0, "skipped": 1}
    assert made["lines"][0] == {
        "section": "a",
        "name": "x",
        "status": "passed",
        "says": "",
        "figures": {"error": "inf"},
    }
    assert "  skipped  z: no GPU" in text and made["verdict"] in text
    assert made["verdict"].endswith("1 line passed. To know: y. Not checked here: z.")
    sections(("a", [Line("x", PASSED), Line("y", FAILED, "why")]))
    done = run("check", "--json")
    assert done.exit_code == 1
    (only,) = done.stdout.splitlines()
    assert json.loads(only)["passed"] is False
    assert json.loads(only)["verdict"].startswith("1 line of 2 failed on ") and "y." in json.loads(only)["verdict"]


def test_quick_leaves_out_speed():
    names = [section.name for section in report.sections(quick=True)]
    assert names == ["machine", "operations", "products", "references", "answers"]
    assert [section.name for section in report.sections()] == [*names, "speed"] == list(SECTIONS)
    assert [section.name for section in report.sections(only=("speed", "machine"))] == ["machine", "speed"]


def test_predicted_steps_are_in_the_verdict():
    line = Line("predicted step in bfloat16", PASSED, "", {"predicted_ms": 12.6})
    assert report.verdict([report.Found("speed", line)]).endswith(" Predicted: step in bfloat16 13 ms.")


def test_wrong_usage_and_help_import_no_model():
    assert run("check", "--fast").exit_code == 2
    code = "import sys; from mlx_dgemma.cli.main import main; main(['check', '--help'], standalone_mode=False);"
    done = python("-c", f"{code} print([n for n in ('mlx', 'transformers') if n in sys.modules])")
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_single_section_can_be_asked_for():
    done = run("check", "--section", "machine", "--json")
    made = json.loads(done.stdout)
    assert done.exit_code == 0 and {line["section"] for line in made["lines"]} == {"machine"}
