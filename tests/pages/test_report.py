import errno
import json
import re
from html.parser import HTMLParser

import pytest

from srpo_cli.errors import SrpoError
from srpo_cli.pages.report import verdict, write_report
from srpo_cli.pages.results import commands, flattened, heading, of_the_miniature, published_rows
from srpo_cli.pages.study import study_context

LABELS = ("base", "tuned")
VOID = {"meta", "link", "input", "br", "img", "hr"}
SVG = {"path", "line", "circle", "polygon", "rect"}


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed, and its text and attributes are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert tag in SVG | VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def made(tmp_path, pictures, table):
    """A table of eight pictures a model in a folder."""
    return table(LABELS, pictures(tmp_path, LABELS, 8), 2)


def page_of(folder, *arguments):
    return Page(write_report(folder, *arguments).read_text(encoding="utf-8"))


def test_a_whole_report_is_well_formed_and_its_anchors_lead_somewhere(tmp_path, made, result, study):
    page = page_of(tmp_path, result(made), made, study())
    anchors = {attributes["href"][1:] for tag, attributes in page.tags if attributes.get("href", "").startswith("#")}
    assert len(anchors) > 15
    assert anchors <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_every_table_has_headers_for_its_columns_and_rows(tmp_path, made, result, study):
    text = write_report(tmp_path, result(made), made, study()).read_text(encoding="utf-8")
    tables = re.findall(r"<table.*?</table>", text, re.DOTALL)
    assert len(tables) > 8
    for each in tables:
        rows = re.findall(r"<tr.*?</tr>", each, re.DOTALL)
        assert all('scope="' in row for row in rows)
        columns = re.findall(r'<th scope="col"', each)
        widths = {len(re.findall(r"<t[hd][ >]", row)) for row in rows if "colspan" not in row}
        assert len(widths) == 1
        assert len(columns) in (0, *widths)


def test_the_page_names_nothing_that_a_network_would_fetch(tmp_path, made, result, study):
    page = page_of(tmp_path, result(made), made, study())
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert re.match(r"#|data:|$", attributes.get(name, "")), (tag, attributes)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy and "http" not in policy
    assert not any("style" in attributes for _, attributes in page.tags)  # the policy would not apply it


def test_the_numbers_of_the_table_are_those_of_the_result(tmp_path, made, result):
    made_result = result(made)
    text = write_report(tmp_path, made_result, made).read_text(encoding="utf-8")
    for label in LABELS:
        row = re.search(rf'<tr data-model="{label}">.*?</tr>', text, re.DOTALL)[0]
        for name, digits in (("hpsv2.1", 4), ("sgp:hpsv2.1", 5)):
            figure = made_result["figures"][label]["all"][name]
            cell = re.search(rf'data-measure="{name}">(.*?)</td>', row, re.DOTALL)[1]
            assert cell.startswith(f"{figure['mean']:.{digits}f}")
            assert f"[{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]" in cell


def test_the_verdict_stands_first(tmp_path, made, result):
    made_result = result(made)
    page = page_of(tmp_path, made_result, made)
    sentence = verdict(made_result)[0]
    assert re.sub(r"\s", "", sentence) in re.sub(r"\s", "", page.text)
    assert page.ids.index("verdict") < page.ids.index("table")


def test_parts_of_a_measure_and_what_has_no_direction_stand_in_a_table_of_their_own(tmp_path, made, result):
    made_result = result(made)
    for name in ("caption_accuracy", "shape_accuracy"):
        made_result["measures"].append({**made_result["measures"][0], "name": name, "title": name})
        for label in LABELS:
            made_result["figures"][label]["all"][name] = {"mean": 0.99, "low": 0.98, "high": 1.0, "count": 8}
    text = write_report(tmp_path, made_result, made).read_text(encoding="utf-8")
    first, second = re.findall(r'<tr data-model="base">.*?</tr>', text, re.DOTALL)
    sgp = [f"{kind}:hpsv2.1" for kind in ("sgp", "sgp_x100", "sgp_win_rate")]
    assert re.findall(r'data-measure="(.*?)"', first) == ["hpsv2.1", *sgp, "caption_accuracy"]
    assert re.findall(r'data-measure="(.*?)"', second) == ["saturation", "contrast", "shape_accuracy"]


def test_published_rows_are_marked_and_have_no_interval(tmp_path, made, result):
    text = write_report(tmp_path, result(made), made).read_text(encoding="utf-8")
    body = re.search(r'<tbody class="published">.*?</tbody>', text, re.DOTALL)[0]
    assert "Published, not measured here: Table 1 of arXiv 2509.06942. The scale of SGP-HPS is not known." in body
    assert "FLUX.1-dev" in body and "0.2890" in body
    assert "[" not in body and "whole set" not in body


@pytest.mark.parametrize("part", [{"limit": 100}, {"group": "photo"}])
def test_published_rows_say_that_they_are_of_the_whole_set_where_a_part_was_measured(tmp_path, made, result, part):
    made_result = result(made)
    made_result["selection"] |= part
    text = write_report(tmp_path, made_result, made).read_text(encoding="utf-8")
    body = re.search(r'<tbody class="published">.*?</tbody>', text, re.DOTALL)[0]
    assert "They are of the whole set, of which a part was measured here." in body


def test_published_figures_are_found_by_name_or_title_and_a_row_without_any_is_left_out(tmp_path, made, result):
    made_result = result(made)
    made_result["measures"][0] |= {"name": "deqa.py", "title": "DeQA"}
    made_result["published"]["rows"] = [
        {"model": "both", "figures": {"deqa": 4.292, "sgp_x100:hpsv2.1": 0.463}},
        {"model": "neither", "figures": {"imagereward": 1.1}},
    ]
    expected = [("both", {"deqa.py": 4.292, "sgp_x100:hpsv2.1": 0.463})]
    assert published_rows(made_result, made_result["measures"]) == expected
    text = write_report(tmp_path, made_result, made).read_text(encoding="utf-8")
    body = re.search(r'<tbody class="published">.*?</tbody>', text, re.DOTALL)[0]
    assert "4.292" in body and "neither" not in body


def test_what_was_skipped_says_how_to_get_it_and_all_of_the_protocol_is_there(tmp_path, made, result):
    made_result = result(made)
    page = page_of(tmp_path, made_result, made)
    assert "hf download yuvalkirstain/PickScore_v1" in page.text
    assert made_result["protocol_digest"] in page.text
    for name, value in flattened(made_result["protocol"]):
        assert name in page.text
        assert value in page.text
    assert "srpo eval base=flux.1-dev tuned=runs/1 --benchmark hpdv2" in page.text


def test_every_column_is_in_the_glossary_with_its_direction(tmp_path, made, result):
    text = write_report(tmp_path, result(made), made).read_text(encoding="utf-8")
    entries = re.findall(r"<dt id=\"m\d+\">(.*?)<span>(.*?)</span></dt>\s*<dd>(.*?)</dd>", text)
    assert [title for title, _, _ in entries] == [measure["title"] for measure in result(made)["measures"]]
    assert [direction for _, direction, _ in entries] == ["higher is better"] * 4 + ["no direction is better"] * 2
    assert all(len(words) > 15 for _, _, words in entries)


@pytest.mark.parametrize(
    ("benchmark", "model", "layout", "expected"),
    [
        ("hpdv2", "flux.1-dev", "lists", False),
        ("miniature", "miniature", "world", True),
        ("mine", "miniature", "table", True),
        ("mine", "pictures", "world", True),
    ],
)
def test_the_miniature_is_never_passed_off_as_flux(tmp_path, made, result, benchmark, model, layout, expected):
    made_result = result(made, benchmark, model)
    made_result["protocol"]["benchmark"]["prompts"]["layout"] = layout
    assert of_the_miniature(made_result) is expected
    assert ("no evidence about FLUX" in page_of(tmp_path, made_result, made).text) is expected


def test_what_was_not_measured_is_a_dash_and_never_a_zero(tmp_path, made, result):
    made_result = result(made)
    del made_result["figures"]["tuned"]["all"]["hpsv2.1"]
    made_result["figures"]["base"]["all"]["contrast"] |= {"low": None, "high": float("nan")}
    made_result["comparisons"] = [c for c in made_result["comparisons"] if c["measure"] != "hpsv2.1"]
    text = write_report(tmp_path, made_result, made).read_text(encoding="utf-8")
    row = re.search(r'<tr data-model="tuned">.*?</tr>', text, re.DOTALL)[0]
    assert re.search(r'data-measure="hpsv2.1">(.*?)</td>', row, re.DOTALL)[1] == "\N{EN DASH}"
    assert ">nan<" not in text.lower()


def test_a_report_needs_no_pictures_no_groups_and_no_second_model(tmp_path, made, result):
    rows = made[(made["model"] == "base") & (made["group"] == "anime")]
    bare = result(rows) | {"published": None, "skipped": [], "batches": {}, "cost": {}, "environment": {}}
    page = page_of(tmp_path, bare, None)
    assert "Nothing was compared" in page.text
    assert heading(bare) in page.text
    assert not {"pictures", "groups", "differences", "hacking", "skipped"} & set(page.ids)


def test_a_study_stands_alone_and_its_rates_are_there(tmp_path, study):
    analysis = study()
    page = page_of(tmp_path, None, None, analysis)
    assert "verdict" not in page.ids
    for arm in analysis["arms"]:
        for figures in analysis["grades"][arm].values():
            assert f"{100 * figures['excellent']['mean']:.1f} %" in page.text
            low, high = (100 * figures["excellent_wilson"][end] for end in ("low", "high"))
            assert f"Wilson [{low:.1f}, {high:.1f}]" in page.text
    assert "undefined" in page.text and "tentative" in page.text
    assert "3 of 5,000 grades are the experts' consensus." in page.text


def test_grades_are_drawn_from_excellent_to_fail_with_the_rule_beside_them(study):
    cards = study_context(study())["grade_cards"]
    assert [card["title"] for card in cards][-2:] == ["Overall", "Overall by the rule"]
    counts = study()["grades"]["base"]["realism"]["counts"]
    told = [
        f"base: {name} {n} of {sum(counts)}"
        for name, n in zip(("Fail", "Pass", "Good", "Excellent"), counts, strict=True)
    ]
    places = [cards[1]["svg"].index(each) for each in reversed(told)]
    assert places == sorted(places)


def test_pairs_have_outcomes_and_strengths(tmp_path, study):
    page = page_of(tmp_path, None, None, study("pairs", ("base", "ours", "refl")))
    assert {"pairs", "raters"} <= set(page.ids) and "excellent" not in page.ids
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes]
    assert any("ours / base: win 300 of 500 (60.0 %)" in label for label in labels)
    assert any(label.startswith("Bradley-Terry strengths. base: 0.00") for label in labels)


def test_the_command_is_the_recorded_one_whatever_models_are_called(tmp_path, made, result):
    made_result = result(made)
    for model, path in zip(made_result["models"], ("given/base", "given/runs/1"), strict=True):
        model["weights"] = str(tmp_path / path)
    typed = ["/usr/bin/srpo", "eval", "flux", "runs/1", "-b", "hpdv2", "--metric", "hpsv2.1", "-n", "2"]
    made_result["environment"]["command"] = typed
    assert commands(made_result) == ["srpo eval flux runs/1 -b hpdv2 --metric hpsv2.1 -n 2"]
    text = write_report(tmp_path, made_result, made).read_text(encoding="utf-8")
    assert "srpo eval flux runs/1 -b hpdv2 --metric hpsv2.1 -n 2</code>" in text
    assert ">given/runs/1<" in text and str(tmp_path) not in text  # as it is found from the report


def test_of_what_was_put_together_every_command_is_there_and_where_none_was_typed_none_is(tmp_path, made, result):
    made_result = result(made)
    made_result["commands"] = [["/bin/srpo", "eval", "a b"], [], ["main.py", "eval", "run", "c"]]
    assert commands(made_result) == ["srpo eval 'a b'", "srpo eval run c"]
    del made_result["commands"]
    for command in (["train.py", "--fast"], []):
        made_result["environment"] = {"command": command}
        assert commands(made_result) == []
    assert "To reproduce it" not in page_of(tmp_path, made_result, made).text


def test_prompts_are_counted_and_different_texts_where_there_are_fewer(tmp_path, made, result):
    made_result = result(made)
    assert "8 prompts, 16 pictures of 2 models" in page_of(tmp_path, made_result, made).text
    made_result["counts"]["texts"] = 5
    assert "8 prompts, 5 different texts, 16 pictures" in page_of(tmp_path, made_result, made).text


def test_batches_say_how_large_they_are(tmp_path, made, result):
    text = write_report(tmp_path, result(made), made).read_text(encoding="utf-8")
    assert '<td class="text">photo</td><td>80</td><td>0.2800 ± 0.00400</td>' in text


def test_prompts_that_nothing_vouches_for_are_told_with_their_digest(tmp_path, made, result):
    made_result = result(made)
    assert f"Prompts: not verified, digest {'ab' * 32} ." in page_of(tmp_path, made_result, made).text
    made_result["prompts"]["unverified"] = []
    assert "unverified" not in page_of(tmp_path, made_result, made).ids


def test_pictures_that_were_drawn_nobody_knows_how_are_told(tmp_path, made, result):
    made_result = result(made)
    assert "unknown" not in page_of(tmp_path, made_result, made).ids
    made_result["models"][1] |= {"sampling": "unknown", "weights": None}
    page = page_of(tmp_path, made_result, made)
    assert "How the pictures of tuned were drawn is not known" in page.text


def test_what_a_reader_has_to_know_of_the_figures_stands_in_the_answer(tmp_path, made, result):
    page = page_of(tmp_path, result(made) | {"notes": ["only 3 prompts: <i>"]}, made)
    assert page.text.index("Only 3 prompts: <i>.") < page.text.index("The table")


def test_different_protocols_are_warned_of(tmp_path, made, result):
    made_result = result(made)
    assert "mixed" not in page_of(tmp_path, made_result, made).ids
    made_result["protocol"]["mixed"] = ["steps is 12 and 50"]
    page = page_of(tmp_path, made_result, made)
    assert "mixed" in page.ids
    assert "steps is 12 and 50" in page.text


def test_a_signal_is_told_by_its_title_and_by_how_large_it_is(tmp_path, made, result):
    made_result = result(made)
    signal = next(each for each in made_result["hacking"] if each["model"] == "tuned")
    signal |= {"difference": -0.5, "spread": 0.25, "crossed": True, "text": "band_5 -6.1 -> -6.6"}
    text = write_report(tmp_path, made_result, made).read_text(encoding="utf-8")
    row = re.search(rf'<tr data-signal="{signal["signal"]}">.*?</tr>', text, re.DOTALL)[0]
    assert "2.0 standard deviations of the baseline" in row and "band_5" not in row and "-6.1" not in row


def test_an_interval_is_said_to_be_less_than_a_corrected_p(tmp_path, made, result):
    text = page_of(tmp_path, result(made), made).text
    assert "chance does not explain" not in text and "it may keep clear of the dashed zero where p does not" in text


def test_what_eval_writes_is_what_the_report_reads(tmp_path, made):
    from srpo_cli.config.benchmark import load_benchmark
    from srpo_cli.metrics.aggregate import Measure
    from srpo_cli.recipes.results import summarise

    measures = [
        Measure("miniature", "plain reward", ("hpsv2.1",), note="cosine"),
        Measure("saturation", "saturation", ("saturation",), better=""),
        Measure("fid", "FID", (), better="lower"),
    ]
    models = [
        {"label": label, "model": "miniature", "weights": None, "fingerprint": "0", "pictures": 8, "folder": label}
        for label in LABELS
    ]
    protocol = {"benchmark": load_benchmark("miniature").model_dump(mode="json"), "items": 8, "steps": 12}
    summary = summarise(
        made, measures, load_benchmark("miniature"), protocol, models, sets={label: {"fid": 12.5} for label in LABELS}
    )
    page = page_of(tmp_path, summary, made)
    assert f"{summary['figures']['tuned']['all']['miniature']['low']:.3f}" in page.text
    assert "12.500" in page.text
    assert {"differences", "groups", "hacking"} <= set(page.ids)
    assert "no evidence about FLUX" in page.text


def test_nested_settings_are_rows_with_dotted_names():
    nested = {"a": {"b": [1, 2], "c": None}, "d": [{"e": "text"}], "f": {}}
    assert list(flattened(nested)) == [("a.b", "[1, 2]"), ("a.c", "null"), ("d.0.e", "text"), ("f", "{}")]


def test_a_report_is_replaced_whole(tmp_path, made, result):
    first = write_report(tmp_path, result(made), made).read_text(encoding="utf-8")
    again = write_report(tmp_path, json.loads(json.dumps(result(made))), made).read_text(encoding="utf-8")
    assert first == again
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_report_that_cannot_be_written_is_one_line_and_the_old_one_stays(tmp_path, made, result, monkeypatch):
    before = write_report(tmp_path, result(made), made).read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SrpoError, match="is full"):
        write_report(tmp_path, result(made), made)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
