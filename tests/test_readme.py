"""The pages: links lead somewhere, commands exist, the README is short, its example runs, its numbers are recorded."""

import json
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from rlhf_lessons.__main__ import main
from rlhf_lessons.trainer import PPOConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(p for f in ("notebooks", "figures", "tests") for p in (ROOT / f).rglob("*.md"))])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language=""):
    """The text of every fenced block in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text):
    """The page without its fenced blocks, where brackets are code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text):
    """The names by which a page's headings are linked: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def relative_links(page):
    """(file, anchor) of every link and picture that leads to another place in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path if path else page), anchor


def commands():
    """(command, its options) of every `python -m rlhf_lessons COMMAND --options` on a page.

    Not on those that a measurement wrote: they say what was typed then.
    """
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "bench.md")
    for line in re.findall(r"python -m rlhf_lessons ([a-z]+[^`#\n]*)", text):
        yield line.split()[0], frozenset(re.findall(r"--[a-z-]+", line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for target, anchor in relative_links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_the_readme_is_a_first_page():
    assert len(README.splitlines()) <= 125


def test_the_readme_leads_to_every_lesson_and_every_page():
    linked = {target.resolve() for target, _ in relative_links(ROOT / "README.md")}
    first = {page for page in PAGES if page.parent.parent == ROOT and page.name == "README.md"}
    assert first | {ROOT / "CONTRIBUTING.md"} | set(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb")) <= linked


@pytest.mark.parametrize(("command", "options"), sorted(set(commands()), key=str))
def test_the_pages_name_commands_and_options_that_exist(command, options, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert options <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), command


def test_the_pages_name_targets_that_make_has():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.M))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"ppo", "test"} <= named <= targets


def test_the_example_runs(capsys):
    (example,) = blocks(README, "python")
    exec(example.replace("num_iterations=10", "num_iterations=1, batch_size=8, minibatch_size=4"), {})
    step, score, kl = map(float, capsys.readouterr().out.split())
    assert step == 1 and -24 <= score < 0 and abs(kl) < 1


def test_the_readme_says_where_gold_goes_with_and_without_the_penalty():
    def mean_gold(kl_coef, when):
        files = sorted((ROOT / "figures" / "runs").glob(f"kl{kl_coef:g}-seed*/summary.json"))
        return sum(json.loads(file.read_text(encoding="utf-8"))[when]["gold"] for file in files) / len(files)

    beta = PPOConfig().kl_coef
    before, with_penalty, without = mean_gold(beta, "before"), mean_gold(beta, "after"), mean_gold(0, "after")
    said = f"gold goes from {before:.1f} to {with_penalty:.1f} with the penalty, to {without:.1f} without"
    assert said in " ".join(README.replace("−", "-").split())


def shown_answers():
    """(prompt, before, after PPO, after PPO without the penalty) of the page of figures."""
    page = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    table = page[page.index("| prompt | before | after PPO") :].split("\n\n")[0]
    return [[cell.strip(" …") for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def recorded_answers(kl_coef, prompt):
    """What the first recorded run at this β answered, before and after."""
    samples = (ROOT / "figures" / "runs" / f"kl{kl_coef:g}-seed0" / "samples.md").read_text(encoding="utf-8")
    before, after = samples[samples.index(f"**{prompt}**") :].splitlines()[4:6]
    return [row.split("|")[-2].strip() for row in (before, after)]


def test_answers_shown_are_those_of_the_recorded_runs():
    for prompt, before, after, without_penalty in shown_answers():
        assert recorded_answers(PPOConfig().kl_coef, prompt) == [before, after]
        assert recorded_answers(0, prompt) == [before, without_penalty]
    assert len(shown_answers()) >= 3


def test_the_readme_quotes_one_of_them():
    section = prose(README[README.index("## Two commands") : README.index("<details>")])
    quotes = re.findall(r'"([^"]+)"', re.sub(r"`[^`]+`", "", section))
    assert [quote.strip(" …") for quote in quotes] in shown_answers()


# --- The rooms and the details ------------------------------------------------------------------

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "rlhf_lessons"
ROOMS = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} | {
    f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")
}
DETAILS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| .+ \|$", CONTRIBUTING, re.M)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_every_room_stands_in_the_readmes_tree_and_in_the_table_of_layers(room):
    tree = README[README.index("rlhf_lessons/ ") : README.index("tests/     ")]
    assert re.search(rf"\b{re.escape(room)}(?!\w)", tree)
    assert re.search(rf"`{re.escape(room)}`", CONTRIBUTING[: CONTRIBUTING.index("One definition")])


@pytest.mark.parametrize(("number", "where"), [(number, where) for number, _, where in DETAILS])
def test_where_a_detail_is_said_to_be_something_is(number, where):
    """`module`, `module.name`, `module.Class.method`, or a setting of PPO's."""
    named = re.findall(r"`([\w.]+)`", where)
    assert named
    for name in named:
        module, *path = name.split(".")
        if not (PACKAGE / f"{module}.py").exists():
            assert module in {field.name for field in fields(PPOConfig)}, name
            continue
        found = import_module(f"rlhf_lessons.{module}")
        for part in path:
            found = getattr(found, part)


def test_every_detail_is_listed_once_and_marked_by_a_test():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    marked = {int(number) for number in re.findall(r"mark\.detail\((\d+)\)", tests)}
    assert [int(number) for number, _, _ in DETAILS] == list(range(1, 38)) == sorted(marked)
