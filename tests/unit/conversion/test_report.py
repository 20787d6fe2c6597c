from __future__ import annotations

import json
import shlex

import pytest

from ckptx.conversion.proof import prove
from ckptx.conversion.report import Facts, Plan, Report
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.messages import Begin, Dropped, End, SourceTensor
from ckptx.storage.file_plan import FilePlan, Region
from ckptx.tensors.joins import concat
from ckptx.tensors.lazy import Filled, Stored, stored


def source(number: int) -> Stored:
    return stored(0, 400 * number, "float32", (10, 10))


@pytest.fixture
def facts() -> Facts:
    """Facts of a plan with a cast, padding, many drops and long notes."""
    tensors = [source(number) for number in range(9)]
    padded = concat([tensors[8], Filled("float32", (2, 10))])
    contents = [tensor.cast("bfloat16") for tensor in tensors[:8]]
    regions = [Region(200 * i, 200, t, f"layers.{i}.weight") for i, t in enumerate(contents)]
    regions.append(Region(1600, 480, padded, "embedding"))
    left = [stored(0, 3600 + 4 * i, "float32", (1,)) for i in range(20)]
    drops = tuple(
        Dropped(f"layers.{i}.inv_freq", "computed from the config", tensors=(t,))
        for i, t in enumerate(left)
    )
    sources = tuple(SourceTensor(f"s{i}", t) for i, t in enumerate([*tensors, *left]))
    begin = Begin("hf", "hf/llama", {}, ("/models/llama/model.safetensors",), sources)
    plan = SavePlan(
        [FilePlan("out.bin", 2080, regions)],
        notes=("a note that is long enough to need more than one line on a narrow terminal",),
        stages=("stage 0: embedding, layers 0-7",),
        load_hint="load {target}",
        details={"tp": 2},
    )
    end = End(drops)
    return Facts.of(begin, end, plan, prove(plan, begin, end)).at("/out")


@pytest.fixture
def report(facts):
    return Report("hf", "core", "/out", facts, seconds=2.0, digest="sha256:" + "ab" * 32)


@pytest.fixture
def forecast(facts):
    outputs = [{"path": f"shard_{i}.bin", "bytes": 100, "tensors": 1} for i in range(12)]
    tensors = [{"file": "out.bin", "name": "embedding"}]
    return Plan(
        "hf", "core", "/out", facts, outputs, ("tracker",), 512 << 20, 1 << 20, "no room", tensors
    )


def test_facts_count_what_the_plan_does(facts):
    assert (facts.files, facts.tensors, facts.source_tensors) == (1, 9, 29)
    assert (facts.bytes_in, facts.bytes_out) == (9 * 400 + 80, 2080)
    assert list(facts.inexact) == ["float32 -> bfloat16"]
    assert facts.filled == {"embedding": 20}
    assert facts.dropped[3] == {
        "name": "layers.3.inv_freq",
        "reason": "computed from the config",
        "bytes": 4,
    }


def test_json_is_complete_and_its_keys_are_stable(report):
    content = json.loads(json.dumps(report.to_json()))
    assert list(content) == [
        "loader",
        "saver",
        "target",
        "source_format",
        "source_layout",
        "families",
        "files",
        "tensors",
        "source_tensors",
        "bytes_in",
        "bytes_out",
        "dtypes",
        "inexact",
        "widened",
        "filled",
        "replicas",
        "dropped",
        "notes",
        "stages",
        "details",
        "load_hint",
        "seconds",
        "gb_per_second",
        "digest",
        "resumed",
    ]
    assert len(content["dropped"]) == 20
    assert len(content["inexact"]["float32 -> bfloat16"]) == 8
    assert content["load_hint"] == "load /out"


def test_forecast_json_adds_files_tensors_and_needs(forecast):
    content = json.loads(json.dumps(forecast.to_json()))
    assert len(content["outputs"]) == 12
    assert content["disk"] == 2080 + (1 << 20)
    assert content["peak_memory"] == 512 << 20
    assert content["pointers"] == ["tracker"]
    assert content["refused"] == "no room"
    assert content["output_tensors"][0]["name"] == "embedding"


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("kind", ["report", "forecast"])
def test_text_fits_its_width(request, kind, width):
    text = request.getfixturevalue(kind).render(width)
    assert max(map(len, text.splitlines())) <= width
    for label in ("source", "tensors", "bytes", "inexact", "filled", "dropped", "note"):
        assert any(line.startswith(label) for line in text.splitlines()), label


def test_text_shows_long_lists_in_part(report):
    text = report.render(200)
    assert "layers.4.weight and 3 more" in text
    assert "layers.4.inv_freq and 15 more (80 bytes): computed from the config" in text
    assert "layers.9.inv_freq" not in text


def test_text_of_a_forecast_lists_every_file_and_stage(forecast):
    lines = forecast.render(60).splitlines()
    assert sum(line.startswith("file") for line in lines) == 13
    assert "stage     stage 0: embedding, layers 0-7" in lines


def test_exact_conversion_says_so(facts):
    from dataclasses import replace

    exact = Report("hf", "hf", "/out", replace(facts, inexact={}, filled={}), 1.0, "")
    assert "inexact   none: every value is the source's" in exact.render(80).splitlines()


def test_what_is_filled_is_not_the_sources(facts):
    """Not only padding: a norm that takes no part in the output is filled, too."""
    from dataclasses import replace

    filled = Report("hf", "hf", "/out", replace(facts, inexact={}), 1.0, "").render(80)
    assert "inexact   none: every value but what is filled is the source's" in filled.splitlines()


def test_load_hint_can_be_pasted_into_a_shell(facts):
    from dataclasses import replace

    command = replace(facts, load_hint="load {target} --tp 2").at("/my models/out")
    assert shlex.split(command.load_hint) == ["load", "/my models/out", "--tp", "2"]
    python = replace(facts, load_hint='from_pretrained("{target}")').at("/my models/out")
    assert python.load_hint == 'from_pretrained("/my models/out")'
