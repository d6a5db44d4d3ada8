"""The `claim` fixture, and the page that a run of the proofs prints or writes.

Claims travel as properties of test reports, so they arrive from parallel workers too.
"""

import pytest

from proof.claims import Claim, Claims, topic_order, write_page


def pytest_addoption(parser):
    parser.addoption("--write-claims", action="store_true", help="write what was proved to tests/proof/CLAIMS.md")


@pytest.fixture
def claim(request) -> Claims:
    """Records a claim and asserts it: `claim.equal`, `claim.biased`, `claim.decreasing`."""
    module = request.module.__doc__.strip()
    request.node.user_properties.append(("topic", module))
    return Claims(request.node)


def pytest_terminal_summary(terminalreporter, config):
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" and any(name == "claim" for name, _ in report.user_properties)
    ]
    topics, files = {}, {}
    for report in sorted(reports, key=lambda report: (*report.location[:2], report.nodeid)):
        title, _, explanation = dict(report.user_properties)["topic"].partition(". ")
        claims = [Claim(**values) for name, values in report.user_properties if name == "claim"]
        files[title] = report.location[0]
        topics.setdefault(title, (explanation, []))[1].extend(claims)
    for title in sorted(topics, key=topic_order):
        terminalreporter.section(title, sep="-")
        for made in topics[title][1]:
            terminalreporter.write_line(made.line())
    if config.getoption("--write-claims", default=False):
        if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
            terminalreporter.write_line("CLAIMS.md not written: not everything passed")
        else:
            # A topic of which something was skipped, a peer that is not installed, keeps its section.
            skipped = {report.location[0] for report in terminalreporter.stats.get("skipped", [])}
            partial = {title for title, file in files.items() if file in skipped}
            write_page({title: topic for title, topic in topics.items() if title not in partial})
            terminalreporter.write_line("CLAIMS.md written")
