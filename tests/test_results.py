"""What benchmarks/RESULTS.md shows of what was measured."""

import json
from typing import Any

from benchmarks.results import FOLDER, PAGE, RESULTS, newest, render

LOADER = "python benchmarks/loader.py --seconds 15"


def row(
    case: str, value: float, command: str = LOADER, device: str = "a GPU", date: str = "2026-01-01"
) -> dict[str, Any]:
    found = {"bench": "loader", "case": case, "value": value, "unit": "s", "goal": "", "meets": None, "commit": "c"}
    return {**found, "command": command, "device": device, "date": date}


def shown(*rows: dict[str, Any]) -> dict[str, float]:
    return {f"{each['case']} on {each['device']}": each["value"] for each in newest(rows)}


def test_the_newest_run_of_a_command_is_shown_and_no_case_of_an_older_one():
    first = [row("kept", 1), row("gone", 1)]
    assert shown(*first) == {"kept on a GPU": 1, "gone on a GPU": 1}
    assert shown(*first, row("kept", 2, date="2026-01-02")) == {"kept on a GPU": 2}


def test_a_later_run_with_other_cases_takes_the_place_of_the_older_one():
    times = ("2026-01-02T10:00:00", "2026-01-02T10:50:00")
    first, second = (row(case, 2, date=date) for case, date in zip(("new name", "another"), times, strict=True))
    assert shown(row("old name", 1), first, second) == {"new name on a GPU": 2, "another on a GPU": 2}


def test_places_and_rounds_do_not_make_another_command():
    again = row("kept", 2, "python benchmarks/loader.py --folder /tmp/f --seconds 20", date="2026-01-02")
    assert shown(row("kept", 1), row("gone", 1), again) == {"kept on a GPU": 2}


def test_commands_that_measure_other_things_stand_beside_each_other():
    other = row("many", 3, "python benchmarks/loader.py --many 100000", date="2026-01-02")
    assert shown(row("kept", 1), other) == {"kept on a GPU": 1, "many on a GPU": 3}


def test_of_a_case_of_two_commands_the_newest_row_is_shown_wherever_it_stands():
    newer = row("both", 2, "python benchmarks/loader.py --many 5", date="2026-01-03")
    assert shown(newer, row("both", 1, date="2026-01-02")) == {"both on a GPU": 2}


def test_each_machine_has_its_own_and_what_was_granted_of_it_makes_no_other():
    rows = [row("x", 1), row("x", 2, device="a CPU"), row("x", 3, device="a GPU, 24 GB of it")]
    assert shown(*rows) == {"x on a CPU": 2, "x on a GPU, 24 GB of it": 3}


def test_a_store_of_another_version_is_another_store():
    rows = [row("Ceph 16.2.15 2 GiB up", 1), row("Ceph 20.2.4 2 GiB up", 2, date="2026-01-02")]
    assert list(shown(*rows).values()) == [1, 2]


def test_what_no_command_measures_any_more_is_not_shown():
    gone = row("a file", 1, "python benchmarks/no_such_file.py"), row("an option", 1, f"{LOADER} --no-such-option")
    assert shown(*gone, row("kept", 1)) == {"kept on a GPU": 1}


def test_the_page_is_what_the_rows_make():
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert PAGE.read_text() == render(rows)
    assert len(newest(rows)) < len(rows)
    assert all((FOLDER.parent / each["command"].split()[1]).is_file() for each in newest(rows))


def test_flows_that_were_timed_beside_the_job_stand_on_one_line_each():
    command = "python benchmarks/throughput.py /m --peer tuned"
    figures = {"job": 4, "notebook": 2, "job over notebook": 2, "job, share of bf16 limit": 20}
    timed = [row(f"mllama 16bit, everywhere, tuned peer: {name}", value, command) for name, value in figures.items()]
    alone = row("gemma3 16bit, everywhere: job", 5, command)
    page = render(
        [each | {"bench": "throughput", "unit": "times" if each["value"] == 2 else "%"} for each in (*timed, alone)]
    )
    lines = page.partition("## Training speed")[2].partition("##")[0].splitlines()
    (line,) = [line for line in lines if line.startswith("| mllama")]
    assert line.startswith("| mllama 16bit, everywhere | tuned | 4 % | 2× | 2× | 20 % |  |  | a GPU | c |")
    assert not any("gemma3" in line for line in lines)
