# SPDX-License-Identifier: Apache-2.0
"""What reports and comparisons show, cell by cell, and what they give as data."""

import builtins
import re

import pytest
import torch
from torch import nn

from peft_spp.reports import MAX_ROWS, kind_of, percent, plain_table, some
from peft_spp.sparsity import compare_sparsity, sparsity_report
from peft_spp.sparsity.counting import PairCounts

from helpers.sparsity_tiny_models import half


def cells(text: str) -> dict[str, list[str]]:
    """The cells of each line by the first of them."""
    lines = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return {first: rest for first, *rest in lines if rest}


def blocks(text: str) -> list[list[str]]:
    """The lines between empty lines."""
    return [block.split("\n") for block in text.split("\n\n")]


def are_aligned_right(table: list[str], first: int) -> bool:
    """Whether the cells of all columns from the `first` on end where their heads end."""
    head, _, *rows = table
    starts = [match.start() for match in re.finditer(r"\S+( \S+)*", head)]
    ends = [match.end() for match in re.finditer(r"\S+( \S+)*", head)]
    return all(
        row[end - 1 : end].strip() and not row[end : end + 1].strip() and len(row[start:end]) == end - start
        for row in rows
        for start, end in list(zip(starts, ends, strict=True))[first:]
    )


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*\d|\d", text)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.00 %"),
        (1e-9, "<0.01 %"),
        (0.00006, "0.01 %"),
        (0.12345, "12.35 %"),
        (0.9999, "99.99 %"),
        (1 - 1e-9, ">99.99 %"),
        (1.0, "100.00 %"),
    ],
)
def test_a_share_is_never_rounded_to_none_or_all(share, text):
    assert percent(share) == text


def test_a_few_names_are_shown_and_the_rest_counted():
    names = list("abcdef")
    assert some(names[:5]) == "a, b, c, d, e"
    assert some(names) == "a, b, c, d, e and 1 more"
    assert some(names, 2) == "a, b and 4 more" and some(names[:2], 2) == "a, b"


@pytest.mark.parametrize(
    ("name", "kind"), [("layers.3.q_proj", "q_proj"), ("a.b.0", "b"), ("0", "0"), ("1.2", "1.2"), ("", ""), ("x", "x")]
)
def test_the_kind_of_a_module_is_the_last_of_its_names(name, kind):
    assert kind_of(name) == kind


def test_columns_are_aligned_and_as_wide_as_their_cells():
    wide = "w" * 300
    text = plain_table(("first", "second"), [(wide, "1"), ("[red]n", "1000")], right=["second"])
    head, rule, first, second = text.splitlines()
    assert first.split() == [wide, "1"] and second.endswith("1000") and len(first) == len(second)
    assert second.startswith("[red]n ") and head.split() == ["first", "second"] and set(rule) != {" "}


def test_the_first_column_may_be_aligned_to_the_right():
    _, _, *rows = plain_table(("n", "name"), [("1", "a"), ("1000", "b")], right=["n"]).splitlines()
    assert [row.rpartition(" ")[0].rstrip() for row in rows] == ["   1", "1000"]


def test_a_table_is_plain_text_where_colors_are_forced_and_in_a_notebook(monkeypatch):
    expected = plain_table(("first", "second"), [("1", "2")])

    class ZMQInteractiveShell:
        pass

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    assert plain_table(("first", "second"), [("1", "2")]) == expected


def test_each_module_has_its_row():
    state = {"a.weight": half(8, 16), "b.weight": half(4, 8).T.contiguous().bfloat16(), "c.weight": torch.ones(2, 2)}
    text = str(sparsity_report(state, conv1d=["b"]))
    found = cells(text)
    assert found["module"] == ["shape", "dtype", "sparsity", "pattern"]
    assert found["a"] == ["8 x 16", "float32", "50.00 %", "2:4"]
    assert found["b"] == ["8 x 4 (in, out)", "bfloat16", "50.00 %", "2:4"]
    assert found["c"] == ["2 x 2", "float32", "0.00 %", "dense"]
    assert numbers(text.splitlines()[-1]) == ["3", "164", "48.78"]
    head, table, rest = blocks(text)
    assert (len(head), len(table), len(rest)) == (1, 5, 1)
    assert [row[:1] for row in table[2:]] == ["a", "b", "c"] and "state dict" in head[0]
    column = slice(table[0].index("sparsity"), table[0].index("sparsity") + len("sparsity"))
    assert [row[column] for row in table[2:]] == [" 50.00 %", " 50.00 %", "  0.00 %"]


def test_negative_zeros_and_what_is_not_finite_have_columns_where_there_are_any():
    state = {"a.weight": half(8, 256), "b.weight": half(8, 16)}
    state["a.weight"][state["a.weight"] == 0] *= -1.0
    state["b.weight"][0] = float("nan")
    text = str(sparsity_report(state))
    found = cells(text)
    assert found["module"][4:] == ["-0.0", "non-finite"]
    assert found["a"][4:] == ["1,024", "0"] and found["b"][4:] == ["0", "16"]
    assert numbers(text.splitlines()[-1])[-3:] == ["1,024", "0.0", "16"]
    only = cells(str(sparsity_report({"a.weight": state["a.weight"]})))
    assert only["module"][4:] == ["-0.0"] and only["a"][4:] == ["1,024"]


@pytest.mark.parametrize("count", [MAX_ROWS, MAX_ROWS + 1])
def test_many_modules_are_shown_by_kind(count):
    state = {f"h.{n}.fc.weight": half(4, 8) if n < 3 else torch.ones(4, 8).bfloat16() for n in range(count - 1)}
    state["other.weight"] = torch.zeros(2, 2)
    found = cells(str(sparsity_report(state)))
    grouped = count > MAX_ROWS
    assert (f"fc x{count - 1}" in found) is grouped and ("h.0.fc" in found) is not grouped
    if grouped:
        assert found["other x1"] == ["2 x 2", "float32", "100.00 %", "unstructured"]
        assert found[f"fc x{count - 1}"] == [
            "4 x 8",
            "float32, bfloat16",
            "0.00 % to 50.00 %",
            f"2:4 x3, dense x{count - 4}",
        ]
        state["h.0.fc.weight"] = half(4, 16)
        assert cells(str(sparsity_report(state)))[f"fc x{count - 1}"][0] == "2 shapes"


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (3, 3), (4, 1)])
def test_what_is_not_counted_is_named_by_its_reason(count, shown):
    state = {f"h.{n}.norm.weight": torch.ones(2, 2) for n in range(count)} | {"lm_head.weight": torch.ones(2, 2)}
    text = str(sparsity_report(state))
    named = [n for n in range(count) if f"h.{n}.norm" in text]
    assert named == list(range(shown)) and (f"{count - 1} more" in text) is (count == 4)
    (norms,) = (one for one in text.splitlines() if "h.0.norm" in one)
    assert "norm:" in norms and "lm_head" in text and "lm_head" not in norms


def test_a_report_is_data():
    state = {"a.weight": half(4, 8), "lm_head.weight": torch.ones(2, 2)}
    state["a.weight"][0] = torch.tensor([-0.0, 0, 1, float("inf"), 1, 0, 0, 0])
    module = {
        "name": "a",
        "shape": [4, 8],
        "dtype": "float32",
        "transposed": False,
        "numel": 32,
        "zeros": 17,
        "sparsity": 17 / 32,
        "negative_zeros": 1,
        "non_finite": 1,
        "fullest_group": {"4": 2, "8": 4},
        "pattern": "2:4",
    }
    assert sparsity_report(state).to_dict() == {
        "source": "state dict",
        "patterns": ["2:8", "2:4", "4:8"],
        "total_sparsity": 17 / 32,
        "numel": 32,
        "zeros": 17,
        "negative_zeros": 1,
        "non_finite": 1,
        "modules": [module],
        "skipped": {"lm_head": "head"},
    }


def test_a_weight_without_places_is_not_sparse():
    report = sparsity_report({"a.weight": torch.ones(0, 4)})
    assert report["a"].sparsity == report.total_sparsity == 0.0
    assert (report["a"].in_features, report["a"].out_features) == (4, 0)


def two_versions():
    before = {f"h.{n}.weight": half(8, 256) for n in range(3)}
    after = {name: weight.clone() for name, weight in before.items()}
    zeros = (before["h.1.weight"] == 0).nonzero()
    after["h.1.weight"][tuple(zeros[:256].T)] = 1.0
    after["h.1.weight"][tuple(before["h.1.weight"].nonzero()[:7].T)] = -0.0
    after["h.2.weight"][tuple((before["h.2.weight"] == 0).nonzero()[0])] = float("nan")
    before["gone.weight"], after["new.weight"] = torch.ones(2, 2), torch.ones(2, 2)
    before["shape.weight"], after["shape.weight"] = torch.ones(2, 2), torch.ones(2, 3)
    before["bytes.weight"], after["bytes.weight"] = torch.ones(2, 2), torch.ones(2, 2).byte()
    return before, after


def test_a_comparison_is_data():
    before, after = two_versions()

    def module(name, zeros_after, lost, gained, negative_zeros, non_finite):
        counts = {"zeros_before": 1024, "zeros_after": zeros_after, "lost": lost, "gained": gained}
        more = {"negative_zeros": negative_zeros, "non_finite": non_finite}
        return {"name": name, "shape": [8, 256], "numel": 2048, **counts, **more}

    comparison = compare_sparsity(before, after)
    assert comparison.to_dict() == {
        "before": "state dict",
        "after": "state dict",
        "kept": False,
        "zeros_before": 3072,
        "lost": 257,
        "gained": 7,
        "negative_zeros": 7,
        "non_finite": 1,
        "modules": [
            module("h.0", 1024, 0, 0, 0, 0),
            module("h.1", 775, 256, 7, 7, 0),
            module("h.2", 1023, 1, 0, 0, 1),
        ],
        "missing_before": ["new"],
        "missing_after": ["gone"],
        "reshaped": {"shape": [[2, 2], [2, 3]]},
        "unreadable": {"bytes": "unreadable: uint8, after"},
    }
    assert compare_sparsity(after, before).unreadable == {"bytes": "unreadable: uint8, before"}
    assert [one.kept for one in comparison] == [True, False, False]


def test_a_comparison_shows_what_was_lost():
    text = str(compare_sparsity(*two_versions()))
    found = cells(text)
    assert found["module"] == ["lost", "zeros before", "share lost"]
    assert found["h.1"] == ["256", "1,024", "25.00 %"] and found["h.2"] == ["1", "1,024", "0.10 %"]
    assert "h.0" not in found
    head, table, rest = blocks(text)
    assert (len(head), len(table), len(rest)) == (2, 4, 5) and are_aligned_right(table, first=1)
    assert numbers(text.splitlines()[1]) == ["3", "257", "3,072", "8.37", "7", "7", "1"]
    for name in ("gone", "new", "shape", "bytes"):
        (told,) = (line for line in text.splitlines()[2:] if re.search(rf"\b{name}\b", line.partition(":")[2]))
        assert numbers(told)[0] == "1"
    assert "(2, 2) -> (2, 3)" in text and "(unreadable: uint8, after)" in text


@pytest.mark.parametrize("losers", [0, 10, 12])
def test_a_comparison_counts_those_that_it_does_not_show(losers):
    before = {f"h.{n}.weight": torch.zeros(4, 4) for n in range(14)}
    after = {name: weight.clone() for name, weight in before.items()}
    for n in range(losers):
        after[f"h.{n}.weight"][0, 0] = 1.0
    comparison = compare_sparsity(before, after)
    text = str(comparison)
    assert len([name for name in cells(text) if name.startswith("h.")]) == min(losers, 10)
    assert re.findall(r"and (\d+) more", text) == (["2"] if losers == 12 else [])
    assert [one.name for one in comparison.worst(3)] == [f"h.{n}" for n in range(min(losers, 3))]
    # the head, the table, how many more, the verdict
    assert [len(block) for block in blocks(text)] == {0: [3], 10: [2, 12, 1], 12: [2, 13, 1]}[losers]
    kept = [compare_sparsity(*pair) for pair in ((before, after), (before, {}), (before, before))]
    assert len({str(one).splitlines()[-1] for one in kept}) == (3 if losers else 2)
    assert ("infinite" in text) is False


@pytest.mark.parametrize("count", [MAX_ROWS, MAX_ROWS + 1])
def test_all_compared_modules_as_a_table(count):
    before = {f"h.{n}.fc.weight": half(8, 256) for n in range(count)}
    after = {name: weight.clone() for name, weight in before.items()}
    after["h.0.fc.weight"].zero_()
    after["h.1.fc.weight"].fill_(1.0)
    table = compare_sparsity(before, after).table()
    assert are_aligned_right(table.splitlines(), first=1)
    found = cells(table)
    assert found["module"] == ["weights", "zeros before", "zeros after", "lost", "new zeros"]
    if count > MAX_ROWS:
        assert found[f"fc x{count}"] == [
            f"{2048 * count:,}",
            f"{1024 * count:,}",
            f"{1024 * count:,}",
            "1,024",
            "1,024",
        ]
    else:
        assert found["h.0.fc"] == ["2,048", "1,024", "2,048", "0", "1,024"]
        assert found["h.1.fc"] == ["2,048", "1,024", "0", "1,024", "0"]


def test_the_model_itself_has_a_name_in_tables():
    layer = nn.Linear(4, 4)
    assert "(root)" in cells(str(sparsity_report(layer)))
    comparison = compare_sparsity({"weight": torch.zeros(4, 4)}, layer)
    assert "(root)" in cells(str(comparison)) and "(root)" in cells(comparison.table())


def test_progress_is_told_for_every_layer():
    before, after = two_versions()
    calls = []
    compare_sparsity(before, after, progress=lambda done, all_: calls.append((done, all_)))
    assert calls == [(n, 7) for n in range(1, 8)]


def test_counts_of_pieces_add_up():
    counts = PairCounts(1, 2, 3, 4, 5)
    counts.add(PairCounts(10, 20, 30, 40, 50))
    assert counts == PairCounts(11, 22, 33, 44, 55)
    assert PairCounts(zeros_before=10, zeros_after=9, lost=3).gained == 2
