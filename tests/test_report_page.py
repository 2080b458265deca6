"""The HTML page: one file that loads nothing, reads without JavaScript, and works in a real browser."""

import functools
import json
import random
import re
import shutil
from html.parser import HTMLParser
from statistics import fmean

import pytest

from deltavit.report.html import page
from deltavit.report.summary import summary

METHODS = {  # trained parameters of the body, mean accuracy
    "linear": (0, 0.56), "bitfit": (102_912, 0.722), "layernorm": (38_400, 0.712), "vpt-shallow": (76_800, 0.625),
    "vpt-deep": (460_800, 0.713), "lora": (294_912, 0.729), "dora": (331_776, 0.731), "loramul": (294_912, 0.735),
    "vera": (24_576, 0.69), "kronecker": (221_248, 0.738), "compacter": (94_000, 0.715), "adapter": (719_000, 0.732),
    "adaptformer": (464_000, 0.737), "repadapter": (519_000, 0.736), "convpass": (487_000, 0.742),
    "ssf": (206_000, 0.73), "rlrr": (330_000, 0.741), "arc": (130_000, 0.734), "fact-tt": (131_000, 0.737),
    "fact-tk": (242_000, 0.734),
    "hta": (220_000, 0.745), "difffit": (141_000, 0.72), "ia3": (55_296, 0.70), "full": (85_798_656, 0.585),
}  # fmt: skip
GROUPS = {
    "natural": ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": ("clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi",
                   "smallnorb_ele"),
}  # fmt: skip
HOSTILE = [
    "</script><script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    "\"'&amp;$title\u2028<!--",
    "🦊 ]]> <b>",
]


def record(model, method, name, seed, *, group=None, shots=None, classes=10, epochs=20, val=False, leaky=False, **over):
    """A finished run's record, its numbers drawn from its own labels."""
    draw = random.Random(f"{model} {method} {name} {shots} {seed}")
    body, level = METHODS.get(method, (50_000, 0.7))
    task = random.Random(name).uniform(-0.25, 0.2)
    test = min(0.99, level + task + draw.gauss(0, 0.012) + 0.02 * random.Random(method + name).gauss(0, 1))
    made = {
        "format": 1, "key": f"{model}-{method}-{name}-{shots}-{seed}", "suite": "mini-vtab", "status": "done",
        "attempts": 1, "model": model, "method": method, "set": name, "group": group, "shots": shots, "seed": seed,
        "protocol": "vtab-1k",
        "recipe": {"method": {"name": method}, "train": {"epochs": epochs}, "data": {"train_on": "train+val"}},
        "chosen": {"train.lr": 0.01},
        "search": {"study": "s", "trials": 12, "val_accuracy": 0.7, "epochs": 20, "on": name},
        "test_accuracy": test, "val_accuracy": test if val else None,
        "class_accuracy": {f"class {i:02}": min(1.0, max(0.0, test + draw.gauss(0, 0.12))) for i in range(classes)},
        "test_pictures": 1000, "test_missed": 0, "body": body, "head": 192 * classes + classes,
        "seconds": 60 + body / 1e6 * 9 + draw.uniform(0, 30), "peak_bytes": int((900 + body / 1e4) * 2**20),
        "device": "cpu", "threads": 2, "precision": "fp32",
        "curve": [
            [e + 1, 2.3 * 0.8**e + draw.uniform(0, 0.05), test * (1 - 0.6 ** (e + 1)) if val else None]
            for e in range(epochs)
        ],
        "test_reads": [{"step": 9, "steps": 9, "weights": "0"}], "clean": True,
        "leaky": {"accuracy": test + 0.01, "epoch": 3} if leaky else None,
        "base": {"name": model, "fingerprint": "f" * 64, "weights": f"{model}.safetensors", "weights_sha256": "a" * 64},
        "preprocessing": {
            "size": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize": "squash",
        },
        "data": {"test": {"size": 1000, "digest": name}},
        "versions": {"deltavit": "0.2.0", "torch": "2.15", "timm": "1.0.31", "python": "3.11"}, "error": None,
    }  # fmt: skip
    return {**made, **over}


@functools.cache
def vtab():
    """24 methods, 19 sets in 3 groups, 2 seeds; one run failed, one read its test split early."""
    model = "vit_base_patch16_224.augreg_in21k"
    records = [
        record(model, method, name, seed, group=group, classes=4, epochs=4)
        for method in METHODS for group, names in GROUPS.items() for name in names for seed in (0, 1)
    ]  # fmt: skip
    records[5] |= {"status": "failed", "error": {"line": "cifar: no such folder, data/cifar", "traceback": ""}}
    records[7] |= {"clean": False, "test_reads": [{"step": 3, "steps": 9, "weights": "0"}]}
    return summary(records, title="VTAB-1k, ViT-B/16")


@functools.cache
def small(leaky=False):
    """Two models, five methods, two sets, val kept apart."""
    return summary([
        record(model, method, name, seed, val=True, leaky=leaky)
        for model in ("deit_tiny", "vit_pico") for method in ("linear", "bitfit", "lora", "kronecker", "hta")
        for name in ("pets", "flowers") for seed in (0, 1, 2)
    ], title="Two sets")  # fmt: skip


@functools.cache
def hostile():
    """Labels that try to leave the text they stand in."""
    return summary([
        record(model, method, name, seed, group=name[:9], val=True, class_accuracy=dict.fromkeys(HOSTILE, 0.5))
        for model in HOSTILE[:2] for method in HOSTILE for name in HOSTILE[:3] for seed in (0, 1)
    ], title=HOSTILE[0])  # fmt: skip


# The text of the page


class Links(HTMLParser):
    """What a page refers to, and how its tables say what they are."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [
            value for key, value in attributes if key in ("src", "href", "action", "data", "srcset", "poster")
        ]


@pytest.mark.parametrize("made", [vtab, small, hostile], ids=["vtab", "small", "hostile"])
def test_a_page_refers_to_nothing_outside_itself(made):
    text = page(made())
    assert all(link == "data:," or link.startswith("#") for link in Links(text).links)
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "unsafe" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize("made", [vtab, small, hostile], ids=["vtab", "small", "hostile"])
def test_the_same_summary_gives_the_same_bytes(made):
    assert page(made()).encode() == page(json.loads(json.dumps(made()))).encode()


def test_every_head_of_a_table_has_a_scope_and_every_table_a_caption():
    tags = Links(page(small(leaky=True))).tags
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    assert sum(tag == "table" for tag, _ in tags) == sum(tag == "caption" for tag, _ in tags)


def test_a_leaky_column_is_there_only_where_records_have_one_and_says_so():
    assert "Best epoch on test" not in page(small())
    assert "Leaky, no result" in page(small(leaky=True))


def test_runs_that_are_in_no_table_are_listed_with_the_reason():
    text = page(vtab())
    assert "cifar: no such folder, data/cifar" in text
    assert "read at step 3 of 9" in text
    missing = summary([record("m", "lora", "pets", 0), record("m", "lora", "pets", 1), record("m", "ssf", "pets", 0)])
    assert "Not run yet: 1" in page(missing)


def test_a_summary_of_nothing_is_a_page_too():
    assert "No finished run" in page(summary([]))


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="needs the python package playwright")
    quiet = [
        "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=quiet)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page on disk, its address by name."""
    folder = tmp_path_factory.mktemp("pages")
    made = {"vtab": vtab(), "small": small(), "leaky": small(leaky=True), "hostile": hostile(), "empty": summary([])}
    for label, told in made.items():
        (folder / f"{label}.html").write_bytes(page(told).encode())
    return lambda label: (folder / f"{label}.html").as_uri()


@pytest.fixture
def opened(browser, written):
    """Open a page in a fresh context; at the end nothing may have failed, and nothing but the page been asked for."""
    contexts, asked, wrong = [], set(), []

    def open_(label, width=1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        context.on("request", lambda request: asked.add(request.url))
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(written(label))
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []
    assert all(url.startswith(("file:", "data:,")) for url in asked)


def column(tab, label):
    """The texts of a column of the main table, as shown, without spreads."""
    heads = tab.locator("#results thead tr:last-child th").all_inner_texts()
    at = [head.rstrip(" ↑↓") for head in heads].index(label)
    cells = tab.locator(f"#results tbody tr:not([hidden]) > :nth-child({at + 1})").all_inner_texts()
    return [cell.split(" ±")[0] for cell in cells]


def head(tab, label):
    return tab.locator("#results thead").get_by_role("button", name=label, exact=True)


def numbers(shown):
    return [None if text == "–" else float(text.replace(",", "")) for text in shown]


@pytest.mark.parametrize("label", ["vtab", "small", "leaky", "hostile", "empty"])
def test_a_page_opens_without_an_error_and_asks_for_nothing(opened, label):
    tab = opened(label)
    assert tab.evaluate("window.hit") is None
    assert tab.locator("main script, main img, main b").count() == 0


def test_hostile_labels_are_shown_as_they_are(opened):
    tab = opened("hostile")
    assert tab.locator("h1").inner_text() == HOSTILE[0]
    assert set(column(tab, "Method")) == set(HOSTILE)
    tab.locator("#cost-chart .mark").first.focus()
    assert tab.locator("#tip").inner_text().split(" · ")[0] in HOSTILE
    assert {text.strip() for text in tab.locator("#classes-chart tbody th").all_inner_texts()} == set(HOSTILE)


def test_a_script_that_came_in_later_does_not_run_and_nothing_can_be_fetched(browser, written):
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(written("small"))
    tab.evaluate("""() => {
        const late = document.createElement("script");
        late.textContent = "window.hit = 1";
        document.body.append(late);
    }""")
    assert tab.evaluate("window.hit") is None
    assert tab.evaluate("fetch('data:,x').then(() => 'fetched', () => 'refused')") == "refused"
    context.close()


@pytest.mark.parametrize(
    ("label", "down_first"), [("Body", True), ("cifar", True), ("Mean of 19 sets", True), ("Rank", True)]
)
def test_a_click_on_a_head_sorts_and_gaps_stay_last(opened, label, down_first):
    tab = opened("vtab")
    for down in (down_first, not down_first):
        head(tab, label).click()
        shown = numbers(column(tab, label))
        values = [v for v in shown if v is not None]
        assert values == sorted(values, reverse=down)
        assert len(shown) == 24
        assert shown[len(values) :] == [None] * (24 - len(values))
        state = tab.locator("#results th[aria-sort]:not([aria-sort=none])").evaluate_all(
            "all => all.map(h => h.ariaSort)"
        )
        assert state == ["descending" if down else "ascending"]


def test_a_method_without_a_mean_stays_last_both_ways(browser, written, tmp_path):
    records = [record("m", method, name, 0) for method in ("lora", "ssf", "hta") for name in ("pets", "dtd")]
    (tmp_path / "gap.html").write_text(page(summary(records[:-1])), encoding="utf-8")
    context = browser.new_context()
    tab = context.new_page()
    tab.goto((tmp_path / "gap.html").as_uri())
    for _ in range(2):
        head(tab, "Mean of 2 sets").click()
        assert column(tab, "Method")[-1] == "hta"
    context.close()


def test_sorting_by_name_counts_and_works_from_the_keyboard(opened):
    tab = opened("vtab")
    head(tab, "Method").focus()
    tab.keyboard.press("Enter")
    assert column(tab, "Method") == sorted(METHODS)
    tab.keyboard.press("Enter")
    assert column(tab, "Method") == sorted(METHODS, reverse=True)


def test_a_sorted_table_shows_the_numbers_of_the_summary(opened):
    tab = opened("vtab")
    head(tab, "PE").click()
    want = {row["method"]: f"{100 * row['scores']['kitti']['mean']:.1f}" for row in vtab()["rows"]}
    assert dict(zip(column(tab, "Method"), column(tab, "kitti"), strict=True)) == want


def test_the_filter_hides_other_methods_in_the_table_and_in_the_chart(opened):
    tab = opened("vtab")
    tab.locator("#filter").fill("FACT")
    assert set(column(tab, "Method")) == {"fact-tt", "fact-tk"}
    assert tab.locator("#shown").inner_text() == "2 of 24 rows"
    assert tab.locator("#cost-chart .mark").count() == 2
    tab.locator("#filter").fill("no such method")
    assert column(tab, "Method") == []
    tab.locator("#filter").fill("")
    assert tab.locator("#cost-chart .mark").count() == 24


def test_one_model_of_several_can_be_chosen(opened):
    tab = opened("small")
    assert len(column(tab, "Method")) == 10
    tab.locator("#model").select_option("vit_pico")
    assert column(tab, "Model") == ["vit_pico"] * 5


def test_unchecked_data_sets_leave_the_table_and_groups_shrink_with_them(opened):
    tab = opened("vtab")
    spans = "all => all.filter(c => !c.hidden && c.tagName === 'TH').map(c => [c.textContent, c.colSpan])"
    assert tab.locator("tr.groups > *").evaluate_all(spans) == [[g, len(names)] for g, names in GROUPS.items()]
    tab.locator("#sets summary").click()
    for name in (*GROUPS["specialized"], "cifar"):
        tab.locator("#sets").get_by_label(name, exact=True).uncheck()
    assert tab.locator("tr.groups > *").evaluate_all(spans) == [["natural", 6], ["structured", 8]]
    assert not tab.locator("#results td[data-set=cifar]").first.is_visible()
    tab.locator("#sets").get_by_role("button", name="all").click()
    assert tab.locator("#results td[data-set=cifar]").first.is_visible()


def test_the_rows_of_a_long_table_can_be_searched(opened):
    tab = opened("vtab")
    tab.get_by_text("Every run in numbers").click()
    tab.locator("#curves input.find").fill("fact-tt kitti")
    assert tab.locator("#curves tbody tr:visible").count() == 2


# The pictures


def marks(tab):
    return {
        text.split(",")[0]: text
        for text in tab.locator("#cost-chart .mark").evaluate_all("all => all.map(m => m.getAttribute('aria-label'))")
    }


@pytest.mark.parametrize("how", ["hover", "focus"])
def test_a_mark_tells_its_own_method_and_values(opened, how):
    tab = opened("vtab")
    for row in vtab()["rows"]:
        if row["method"] in ("linear", "full", "vpt-shallow"):
            getattr(tab.locator(f"#cost-chart .mark[aria-label^='{row['method']},']"), how)()
            mean = row["mean_sets"]
            spread = f"{100 * (mean['sd'] or 0):.1f}"
            assert tab.locator("#tip").inner_text().splitlines()[:3] == [
                row["method"], f"Mean of 19 sets: {100 * mean['mean']:.1f} ± {spread} %", f"{row['body']:,} parameters",
            ]  # fmt: skip
    tab.keyboard.press("Escape")
    assert not tab.locator("#tip").is_visible()


def test_the_switch_changes_the_axis_and_a_wide_span_is_logarithmic(opened):
    tab = opened("vtab")
    title = tab.locator("#cost-chart .x-title")
    assert title.text_content() == "trained parameters of the body (log scale)"
    tab.locator("#x").select_option("seconds")
    assert title.text_content() == "seconds of training"
    tab.locator("#x").select_option("peak_bytes")
    assert title.text_content() == "peak memory, MiB"
    assert "MiB" in marks(tab)["lora"]
    tab.locator("#y").select_option("scores/kitti")
    lora = next(row for row in vtab()["rows"] if row["method"] == "lora")
    assert f"kitti: {100 * lora['scores']['kitti']['mean']:.1f} ±" in marks(tab)["lora"]


@pytest.mark.parametrize("cost", ["body", "seconds", "peak_bytes"])
def test_the_front_is_what_nothing_else_beats(opened, cost):
    tab = opened("vtab")
    tab.locator("#x").select_option(cost)
    rows = [(row["method"], row[cost], row["mean_sets"]["mean"]) for row in vtab()["rows"]]
    best = {m for m, x, y in rows if not any(a <= x and b >= y and (a, b) != (x, y) for _, a, b in rows)}
    assert {method for method, text in marks(tab).items() if "Pareto" in text} == best


def test_rank_bars_join_the_methods_that_the_test_does_not_tell_apart(opened):
    tab = opened("small")
    for place, told in enumerate(small()["ranks"].values()):
        rows = tab.locator("#ranks table.ranks").nth(place).locator("tbody tr")
        assert rows.locator("th").all_inner_texts() == told["order"]
        for bar, members in enumerate(told["same"]):
            dots = rows.evaluate_all(
                """(rows, bar) => rows.filter((row) => row.querySelectorAll(".bar")[bar].querySelector("i"))
                    .map((row) => row.cells[0].textContent)""",
                bar,
            )
            assert dots == members
    tab.locator("#ranks details summary").first.click()
    told = small()["ranks"]["deit_tiny"]
    first, second = told["order"][:2]
    value = told["p"][first][second]
    shown = tab.locator("#ranks .matrix tbody td").nth(1).inner_text()
    assert float(shown.lstrip("<")) == pytest.approx(value, abs=1e-3)


def test_learning_curves_are_drawn_for_the_chosen_methods_and_read_by_arrow_keys(opened):
    tab = opened("small")
    chips = tab.locator("#curve-methods button")
    for chip in chips.all():
        if chip.get_attribute("aria-pressed") == "true":
            tab.locator("#curve-methods").get_by_text(chip.inner_text(), exact=True).click()
            break
    on = tab.locator("#curve-methods [aria-pressed=true]").all_inner_texts()
    assert len(on) == 2
    tab.locator("#curve-set").select_option("pets")
    plot = tab.locator("#curves-chart svg.plot").first
    assert plot.locator(".curve:not(.seed)").count() == 2
    assert plot.locator(".curve.seed").count() == 2 * 3
    plot.focus()
    tab.keyboard.press("ArrowLeft")
    lines = tab.locator("#tip").inner_text().splitlines()
    assert lines[0] == "epoch 19"
    for method in on:
        runs = [r for r in small()["runs"] if (r["model"], r["method"], r["set"]) == ("deit_tiny", method, "pets")]
        assert f"{method}: {100 * fmean(r['curve'][-2][2] for r in runs):.1f} %" in lines


def test_classes_are_compared_the_largest_difference_first(opened):
    tab = opened("small")
    rows = [(r["model"], r["method"]) for r in small()["rows"]]
    chosen = [("deit_tiny", "hta"), ("vit_pico", "linear")]
    tab.locator("#class-set").select_option("pets")
    for select, one in zip(("#class-a", "#class-b"), chosen, strict=True):
        tab.locator(select).select_option(str(rows.index(one)))

    def accuracy(model, method, label):
        return fmean(
            r["classes"][label]
            for r in small()["runs"]
            if (r["model"], r["method"], r["set"]) == (model, method, "pets")
        )

    labels = [f"class {i:02}" for i in range(10)]
    gaps = {label: accuracy(*chosen[0], label) - accuracy(*chosen[1], label) for label in labels}
    assert tab.locator("#classes-chart tbody th").all_inner_texts() == sorted(labels, key=lambda c: -abs(gaps[c]))
    first = tab.locator("#classes-chart tbody tr").first.locator("td").all_inner_texts()
    assert float(first[2].replace("−", "-")) == pytest.approx(100 * max(gaps.values(), key=abs), abs=0.051)


def test_published_numbers_say_why_they_are_not_comparable(opened):
    tab = opened("vtab")
    rows = tab.locator("#published tbody tr")
    assert rows.count() == len(vtab()["published"])
    differs = [bool(one["differs"]) for one in vtab()["published"]]
    assert ["not comparable" in text for text in rows.all_inner_texts()] == differs
    assert any(differs)


# Everybody


@pytest.mark.parametrize("label", ["vtab", "leaky", "hostile"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_never_scrolls_sideways_and_the_table_does_in_its_box(opened, label, width):
    tab = opened(label, width)
    for details in tab.locator("main details summary").all():
        details.click()
    tab.wait_for_timeout(50)
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    if width == 360:
        box, first = tab.locator("#results .box"), tab.locator("#results tbody th").first
        before = first.bounding_box()["x"]
        assert box.evaluate("b => { b.scrollLeft = 200; return b.scrollLeft; }") == 200
        assert first.bounding_box()["x"] == before


CONTRAST = r"""() => {
  const parse = (text) => {
    const [a, b, c, alpha = 1] = text.match(/[\d.e-]+/g).map(Number), times = text.startsWith("color(") ? 255 : 1;
    return [times * a, times * b, times * c, alpha];
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (part) => {
    for (; part; part = part.parentElement) {
      const colour = parse(getComputedStyle(part).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const low = [];
  for (const part of document.querySelectorAll("body *")) {
    if (!part.checkVisibility() || ![...part.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(part), colour = parse(part instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(colour), light(ground(part))], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([part.tagName, part.getAttribute("class"), part.textContent.slice(0, 20), ratio]);
  }
  return low;
}"""
"""Text whose contrast with what lies behind it is under WCAG's 4.5."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(opened, scheme):
    tab = opened("leaky", color_scheme=scheme)
    for details in tab.locator("main details summary").all():
        details.click()
    assert tab.evaluate(CONTRAST) == []
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_without_javascript_the_tables_are_there_and_the_controls_are_not(opened):
    tab = opened("vtab", java_script_enabled=False)
    assert column(tab, "Method") == vtab()["methods"]
    assert numbers(column(tab, "Body")) == [row["body"] for row in vtab()["rows"]]
    assert tab.locator("#ranks table.ranks tbody tr").count() == 24
    assert not tab.locator("#filter").is_visible()
    assert tab.locator("#cost noscript p").is_visible()


def test_a_printed_page_is_light_and_its_tables_are_whole(opened):
    tab = opened("vtab", width=1032, color_scheme="dark")  # A4 across, at 96 dots an inch
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator("#results .box").evaluate("b => b.scrollWidth <= b.clientWidth + 1")
    assert not tab.locator("#filter").is_visible()
