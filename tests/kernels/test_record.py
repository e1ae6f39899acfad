"""tests/record.py counts what the programs said, and calls nothing good that they did not call good."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("record", Path(__file__).parents[1] / "record.py")
record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" tests="6">
<testcase classname="tests.ops.test_cuda" name="test_a[1]" time="0.1" />
<testcase classname="tests.ops.test_cuda" name="test_b"><failure message="m">text</failure></testcase>
<testcase classname="tests.ops.test_cuda" name="test_c"><skipped message="no GPU" /></testcase>
<testcase classname="tests.ops.test_cuda" name="test_d"><error message="m">text</error></testcase>
<testcase classname="tests.ops.test_cuda" name="test_e"><failure>x</failure></testcase>
<testcase classname="tests.ops.test_cuda" name="test_e"><error>y</error></testcase>
<testcase classname="tests.ops.test_cuda" name="test_f"><system-out>s</system-out></testcase>
</testsuite></testsuites>"""

CLEAN = """========= COMPUTE-SANITIZER
........                                                                 [100%]
73 passed, 3 skipped, 1900 deselected in 61.20s (0:01:01)
========= ERROR SUMMARY: 0 errors
"""
RACE_CLEAN = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")


def test_counts_of_a_report():
    counts = record.count_tests(JUNIT)
    assert counts == {
        "passed": 2,
        "failed": 3,
        "skipped": 1,
        "failures": [f"tests.ops.test_cuda::test_{x}" for x in "bde"],
    }


@pytest.mark.parametrize(
    "line, passed, failed, skipped",
    [
        ("73 passed, 3 skipped, 1900 deselected in 61.20s (0:01:01)", 73, 0, 3),
        ("= 1 failed, 2 passed, 1 error in 0.31s =", 2, 2, 0),
        ("2 errors in 0.31s", 0, 2, 0),
        ("no tests ran in 0.01s", 0, 0, 0),
        ("1900 deselected in 0.40s", 0, 0, 0),
        ("Segmentation fault", 0, 0, 0),
        ("a test printed 7 passed\n1 passed in 0.10s", 1, 0, 0),
    ],
)
def test_counts_of_a_line(line, passed, failed, skipped):
    assert record.count_pytest_line(line + "\n") == {"passed": passed, "failed": failed, "skipped": skipped}


@pytest.mark.parametrize(
    "tool, text, want",
    [
        ("memcheck", CLEAN, (0, 0)),
        ("memcheck", "========= ERROR SUMMARY: 12 errors\n========= ERROR SUMMARY: 1 error\n", (13, 0)),
        ("initcheck", "========= ERROR SUMMARY: 4 errors, 1 file skipped\n", (4, 0)),
        ("racecheck", RACE_CLEAN, (0, 0)),
        ("racecheck", "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n", (2, 1)),
        ("racecheck", "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", (1, 0)),
        ("racecheck", "========= ERROR SUMMARY: 0 errors\n", None),
        ("synccheck", "========= COMPUTE-SANITIZER\nTarget application terminated before first CUDA call\n", None),
    ],
)
def test_counts_of_a_sanitizer(tool, text, want):
    want = None if want is None else dict(zip(("errors", "warnings"), want, strict=True))
    assert record.count_sanitizer(tool, text) == want


def test_a_clean_run_is_good():
    assert record.judge_tool("memcheck", 0, CLEAN)["ok"]
    assert record.judge_tool("racecheck", 0, RACE_CLEAN)["ok"]


@pytest.mark.parametrize(
    "tool, status, text",
    [
        ("memcheck", 99, CLEAN),
        ("memcheck", 0, CLEAN.replace("0 errors", "1 error")),
        ("memcheck", 0, CLEAN.replace("========= ERROR SUMMARY: 0 errors\n", "")),
        ("memcheck", 0, CLEAN.replace("73 passed, 3 skipped", "76 skipped")),
        ("memcheck", 0, CLEAN.replace("73 passed", "1 failed, 72 passed")),
        ("racecheck", 0, CLEAN),
        ("racecheck", 0, RACE_CLEAN.replace("0 warnings", "2 warnings")),
    ],
)
def test_a_run_that_is_not_clean_is_not_good(tool, status, text):
    assert not record.judge_tool(tool, status, text)["ok"]


@pytest.mark.parametrize("status, passed, failed", [(1, 5, 0), (0, 0, 0), (0, 5, 1)])
def test_a_suite_that_is_not_good(status, passed, failed):
    counts = {"passed": passed, "failed": failed, "skipped": 2, "failures": []}
    assert not record.judge_suite(status, counts)["ok"]


def test_table():
    suite = record.judge_suite(1, record.count_tests(JUNIT)) | {"seconds": 12.3}
    tools = {
        "memcheck": record.judge_tool("memcheck", 0, CLEAN) | {"seconds": 60.4},
        "racecheck": record.judge_tool("racecheck", 1, "killed") | {"seconds": 1.0},
    }
    result = {"where": {"gpu": "NVIDIA X", "commit": "abc"}, "suite": suite, "sanitizer": tools}
    text = record.markdown(result)
    assert "| commit | abc |" in text
    assert "| suite | 2 | 3 | 1 | – | 12 | FAILED (exit status 1) |" in text
    assert "- tests.ops.test_cuda::test_b" in text
    assert "| memcheck | 73 | 0 | 3 | 0 | 60 | ok |" in text
    assert "| racecheck | 0 | 0 | 0 | no summary | 1 | FAILED (exit status 1) |" in text
    assert not record.is_good(result)
    good = {"sanitizer": {"memcheck": tools["memcheck"]}}
    assert record.is_good(good) and not record.is_good(good | {"missing": "x"}) and not record.is_good({})


def test_two_files_of_a_tool_are_one_result():
    good = record.judge_tool("memcheck", 0, CLEAN) | {"seconds": 3.0}
    both = record.joined(good, good | {"seconds": 5.0})
    assert both["ok"] and both["tests"]["passed"] == 146 and (both["errors"], both["seconds"]) == (0, 5.0)
    bad = record.judge_tool("memcheck", 1, "killed") | {"seconds": 1.0}
    assert not record.joined(good, bad)["ok"] and record.joined(bad, good)["errors"] is None


def test_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("LA2_COMMIT", "0123abc")
    assert record.commit() == "0123abc"


@pytest.mark.parametrize("outcome, status", [("pass", 0), ("assert False", 1), ("import pytest; pytest.skip()", 1)])
def test_from_end_to_end(tmp_path, monkeypatch, capsys, outcome, status):
    """A suite of one test: the exit status and both files say what became of it."""
    test = tmp_path / "test_one.py"
    test.write_text(f"import pytest\n@pytest.mark.gpu\ndef test_one():\n    {outcome}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(sys, "argv", ["record.py"])
    assert record.main(["--suite", "--out", str(tmp_path / "out"), str(test)]) == status
    (found,) = (tmp_path / "out").glob("*.json")
    written = json.loads(found.read_text())
    assert written["ok"] == (status == 0)
    assert written["suite"]["passed"] + written["suite"]["failed"] + written["suite"]["skipped"] == 1
    assert written["where"]["torch"] and written["where"]["commit"]
    assert ("| ok |" in found.with_suffix(".md").read_text()) == (status == 0)
    assert "1 " in capsys.readouterr().out


def abuse(examples, failed=0, skipped=0):
    part = {"passed": 9, "failed": failed, "skipped": skipped, "failures": ["x"] * failed}
    part = record.judge_suite(int(failed > 0), part) | {"seconds": 2.0}
    return record.judge_abuse([part, part], examples, 5000)


def test_examples_are_counted_and_wanted():
    lines = [("a", "cuda", 3000), ("b", "cuda", 5008), ("a", "cpu", 9), ("a", "cuda", 2000)]
    log = "".join(json.dumps({"test": t, "device": d, "examples": n}) + "\n" for t, d, n in lines)
    assert record.count_examples(log) == {"a": 5000, "b": 5008}
    assert abuse({"a": 5000, "b": 5008})["ok"]
    assert not abuse({"a": 4999, "b": 5008})["ok"] and not abuse({})["ok"]
    assert not abuse({"a": 5000}, failed=1)["ok"]
    result = {"where": {"gpu": "NVIDIA X"}, "abuse": abuse({"a": 5000}, failed=1)}
    text = record.markdown(result)
    assert "| abuse | 18 | 2 | 0 | – | 4 | FAILED (exit status 1) |" in text
    assert "of 5000 wanted of each:\n\n- a: 5000\n" in text and "- x\n" in text
    assert not record.is_good(result) and record.is_good({"abuse": abuse({"a": 5000})})
