"""report.html: every number that a browser shows is its file's, texts of a model stay texts, and nothing is asked for.

The page is read as a headless Chromium leaves it; without one those tests are skipped.
"""

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from rlhf_lessons.app.align import optimise
from rlhf_lessons.app.page import TEMPLATE, report_page
from rlhf_lessons.app.run_folder import RunFolder, read_lines, summarise
from rlhf_lessons.config import METHODS, PPOConfig, RewardConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
NASTY = '</script><script>document.title = "broken"</script><img src=x>&amp;\u2028"\n<!--'
PER_TOKEN = ("log_prob", "ref_log_prob", "kl", "value", "advantage", "reward", "ratio")


def response(iteration, number, tokens, names=PER_TOKEN):
    """Numbers that are all different, so that no two can be taken for one another."""
    values = {name: [round(((-1) ** t) * (iteration + number / 10 + t / 100 + q / 1000), 6) for t in range(len(tokens))]
              for q, name in enumerate(names)}  # fmt: skip
    facts = {"iteration": iteration, "prompt": f"prompt {number}", "tokens": tokens, "text": " ".join(tokens)}
    return facts | {"score": iteration + number / 7, "gold": -number / 9, "ended": number != 2} | values


def write_run(path, method="ppo"):
    """A run's files, written by hand; the numbers of tokens as in a run of that method."""
    names = {"ppo": PER_TOKEN, "rloo": (*PER_TOKEN[:3], "advantage", "reward", "ratio")}.get(method, PER_TOKEN[:3])
    folder = RunFolder(path)
    config = METHODS[method](**({"kl_coef": 0.25} if method == "ppo" else {}))
    sources = {"corpus": None, "prompts": "/home/somebody/prompts.txt", "score": None, "reward_model": None}
    settings = {"sources": sources, "reward": asdict(RewardConfig()), method: asdict(config), "method": method}
    folder.write_json("config.json", settings)
    folder.write_json("before.json", {"score": -0.123456, "score_std": 1.5, "gold": None})
    for i in range(1, 8):
        row = {"score": i / 7, "gold": -i / 11, "kl": float("nan") if i == 4 else i * 1e-5, "a<b>_metric": -1.5 * i}
        row |= {"eval_score": i / 13} if i in (3, 6) else {}
        folder.append_metrics(i, row | ({"n": 2**i} if method == "best-of-n" else {}) | {"seconds_update": 0.123 + i})
    for i in (1, 4, 7):
        tokens = [["good", " film", "<eos>"], [NASTY, "", "\n"], ["bad"] * 5, ["the"] * 9]
        folder.append("rollouts.jsonl", [response(i, n, each, names) for n, each in enumerate(tokens)])
    sides = ({"text": NASTY, "score": -0.5, "gold": 0.25}, {"text": "superb .", "score": 2.123456, "gold": None})
    folder.write_json("samples.json", [{"prompt": "the plot", "before": sides[0], "after": sides[1]}])
    return path


def write_page(path, title="PPO", more=""):
    text = report_page(path, summarise(path, last=5), title=title, last=5)
    (path / "report.html").write_text(text.replace("</body>", more + "</body>"), encoding="utf-8")
    return path / "report.html"


class Dom(HTMLParser):
    """How many elements of each kind there are, and the text of those with a data- attribute or an id."""

    def __init__(self, text):
        super().__init__()
        self.kinds, self.open, self.texts, self.attributes = Counter(), [], {}, {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.kinds[tag] += 1
        keys = [(name, value) for name, value in attributes if name.startswith("data-") or name == "id"]
        for key in keys:
            self.texts.setdefault(key, []).append("")
            self.attributes[key] = dict(attributes)
        if tag not in ("meta", "input", "br", "img", "link"):
            self.open.append((tag, keys))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        for key in (key for _, keys in self.open for key in keys):
            self.texts[key][-1] += text

    def named(self, kind):
        """Name -> texts, of the elements with an attribute data-kind."""
        return {name: texts for (attribute, name), texts in self.texts.items() if attribute == f"data-{kind}"}


def opened(page, state=""):
    """The page as a browser leaves it."""
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom",
         f"file://{page}#{state}"], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return Dom(done.stdout)


def shows(text, value):
    """Whether a text of the page says what a file holds, to the last digit."""
    return text == "not finite" if value is None else float(text) == value


# --- In a browser -----------------------------------------------------------------------------------------------------


@in_browser
@pytest.mark.parametrize(
    ("state", "iteration", "recorded", "number", "token", "colour"),
    [
        ("iteration=4&response=2&token=1&colour=kl", 4, 4, 2, 1, "kl"),
        ("iteration=6&response=4&token=9&colour=ratio", 6, 4, 4, 9, "ratio"),
        ("iteration=99&response=99&token=99&colour=nothing", 7, 7, 4, 9, "advantage"),
    ],
)
def test_every_number_on_the_page_is_its_file_s(state, iteration, recorded, number, token, colour, tmp_path):
    dom, rows = opened(write_page(write_run(tmp_path)), state), read_lines(tmp_path / "metrics.jsonl")
    metrics = {name: x for name, x in rows[iteration - 1].items() if name not in ("iteration", "seconds_update")}
    found = dom.named("metric")
    assert found.keys() == {"score", "gold", "kl", "a<b>_metric", "eval_score"}
    assert found["eval_score"] == ["–"] or "eval_score" in metrics
    assert all(shows(*found[name], value) for name, value in metrics.items())
    responses = [x for x in read_lines(tmp_path / "rollouts.jsonl") if x["iteration"] == recorded]
    chosen, tokens = responses[number - 1], dom.named("token")
    assert tokens.keys() == set(PER_TOKEN)
    assert all(shows(*tokens[name], chosen[name][token - 1]) for name in PER_TOKEN)
    listed = dom.named("response")
    for name in ("score", "gold"):
        assert [float(text) for text in listed[name]] == [each[name] for each in responses]
    assert listed["text"] == [each["text"] for each in responses]
    assert listed["ended"] == ["ended", "ended", "cut off", "ended"]
    shown = chosen["tokens"][token - 1].replace("\n", "↵") or "(empty)"
    assert dom.texts["id", "token"] == [f"{shown}   ({token} of {len(chosen['tokens'])})"]
    assert [float(text) for text in dom.named("below")[colour]] == pytest.approx(chosen[colour], abs=0.005001)
    assert f"Iteration {recorded}" in dom.texts["id", "recorded"][0]
    assert dom.texts["id", "chosen"] == [f"{iteration} of 7"]
    summary = summarise(tmp_path, last=5)
    for side, numbers in (("before", json.loads((tmp_path / "before.json").read_text())), ("after", summary["after"])):
        cells = dom.named(side)
        assert cells.keys() == summary["after"].keys() == {"score", "gold", "kl"}
        assert cells["kl"] == [{"before": "–", "after": "not finite"}[side]]
        assert all(shows(*cells[name], numbers[name]) for name in ("score", "gold"))
    (sample,) = json.loads((tmp_path / "samples.json").read_text())
    for side in ("before", "after"):
        assert all(shows(*dom.named(f"{side}-sample")[name], sample[side][name]) for name in ("score", "gold"))
    settings, ppo = dom.named("setting"), asdict(PPOConfig(kl_coef=0.25))
    said = {True: "on", False: "off", None: "none"}
    for name, value in ppo.items():
        (text,) = settings[name]
        assert text == value if isinstance(value, str) else text == said[value] if value in (None, True, False) and (
            not isinstance(value, (int, float)) or isinstance(value, bool)) else float(text) == value  # fmt: skip
    assert settings["prompts"] == ["prompts.txt"] and settings["num_preferences"] == ["4000"]
    assert "changed" in dom.attributes["data-setting", "kl_coef"]["class"]
    assert "changed" not in dom.attributes["data-setting", "gamma"]["class"]
    # What a model wrote has become neither an element nor a script.
    assert dom.kinds["img"] == 0 and dom.kinds["script"] == 2 and dom.texts["id", "title"] == ["A run of PPO"]


@in_browser
@pytest.mark.parametrize("method", ["rloo", "dpo", "best-of-n"])
def test_a_method_s_page_has_what_it_measures_and_no_more(method, tmp_path):
    dom = opened(write_page(write_run(tmp_path, method), title=method), "iteration=3")
    known = {"rloo": set(PER_TOKEN) - {"value"}}.get(method, set(PER_TOKEN[:3]))
    assert dom.named("token").keys() == known and dom.kinds["option"] == len(known)
    assert dom.texts["id", "chosen"] == ["3 of 7 (best of 8)" if method == "best-of-n" else "3 of 7"]
    words = {"rloo": "8 to a prompt", "dpo": "2 times over, 32 in a step", "best-of-n": "gets 64 responses"}[method]
    assert words in dom.texts["id", "words"][0] and "undefined" not in dom.texts["id", "words"][0]


PLAY = """<script>
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
find("iteration").value = 5; find("iteration").dispatchEvent(new Event("input"));
document.querySelectorAll("[name=response]")[3].click();
find("tokens").children[0].focus(); press("ArrowRight"); press("ArrowRight");
document.body.append(make("p", { id: "right" }, String(state.token)));
press("End"); press("ArrowLeft");
find("colour").value = "value"; find("colour").dispatchEvent(new Event("change", { bubbles: true }));
document.body.append(make("p", { id: "address" }, location.hash));
find("tokens").children[2].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
document.querySelectorAll("#panels svg")[0].dispatchEvent(new PointerEvent("pointerdown", { clientX: -9999 }));
</script>"""


@in_browser
def test_keys_touch_and_pointer_choose_and_the_address_keeps_it(tmp_path):
    dom = opened(write_page(write_run(tmp_path), more=PLAY))
    assert dom.texts["id", "right"] == ["3"]
    assert dom.texts["id", "address"] == ["#iteration=5&response=4&token=8&colour=value"]
    chosen = read_lines(tmp_path / "rollouts.jsonl")[3]  # the pointer has chosen iteration 1, and the third token
    assert dom.texts["id", "chosen"] == ["1 of 7"] and dom.texts["id", "token"] == ["the   (3 of 9)"]
    assert all(shows(*dom.named("token")[name], chosen[name][2]) for name in PER_TOKEN)


# --- As a file --------------------------------------------------------------------------------------------------------


def test_the_page_asks_nothing_of_the_network():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and text.endswith("\n")
    assert not re.search(r"https?:|//\w+\.|url\(|@import|\ssrc=|<link|fetch\(|innerHTML|outerHTML|insertAdjacent", text)


def test_what_a_model_wrote_cannot_end_the_data(tmp_path):
    text = write_page(write_run(tmp_path)).read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="run">(.*?)</script>', text, re.DOTALL)
    assert "<" not in data and data.isascii() and "\n" not in data
    read = json.loads(data)
    assert read["rollouts"] == read_lines(tmp_path / "rollouts.jsonl")
    assert read["samples"] == json.loads((tmp_path / "samples.json").read_text())


def test_a_run_s_page_has_no_time_and_no_place_in_it_and_is_small(make_trainer, tmp_path):
    pages = []
    for name in ("one", "other"):
        folder, trainer = RunFolder(tmp_path / name), make_trainer(num_iterations=2)
        given = {"sources": {"prompts": f"/{name}/prompts.txt"}, "ppo": asdict(trainer.config)}
        folder.write_config(given, ["run", "--out", name])
        optimise(trainer, folder, gold=False)
        pages.append((folder.path / "report.html").read_bytes())
    assert pages[0] == pages[1] and pages[0].endswith(b"\n") and len(pages[0]) < 1e6
    assert b"seconds_" not in pages[0] and str(tmp_path).encode() not in pages[0]


@pytest.mark.parametrize("lacking", ["rollouts.jsonl", "samples.json"])
def test_what_a_run_has_not_written_is_left_out(lacking, tmp_path):
    (write_run(tmp_path) / lacking).unlink()
    assert f'"{lacking.split(".")[0]}": []' in write_page(tmp_path).read_text(encoding="utf-8")
