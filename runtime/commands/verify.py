"""`rtx verify`: is a bundle what was written?"""

from __future__ import annotations

import json

import click

from rtx.runtime.commands.opening import device_option
from rtx.runtime.errors import BundleError
from rtx.runtime.verification import Finding, verify_bundle


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--variant", help="Run this variant only.  [default: all]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(bundle: str, variant: str | None, threads: int | None, device: str, as_json: bool) -> None:
    """Check BUNDLE: hashes, tokenizer, graphs, golden vectors.

    Every file is compared with its hash, the tokenizer has to give the golden tokens, each graph has to fit the
    contract and to give the golden outputs within the tolerance it was written with. The exit code is 5 if anything
    fails, 0 otherwise. Variants that do not run on the device are named and left out.
    """
    findings = verify_bundle(bundle, variant=variant, threads=threads, device=device)
    failed = sum(not finding.ok for finding in findings)
    if as_json:
        checks = [
            {
                "check": found.check,
                "ok": found.ok,
                "skipped": found.skipped,
                "measured": found.measured,
                "problems": found.problems,
            }
            for found in findings
        ]
        click.echo(json.dumps({"bundle": bundle, "ok": not failed, "checks": checks}, indent=2, ensure_ascii=False))
    else:
        _print(findings)
        click.echo(f"{bundle}: {_in_words(findings, failed)}")
    if failed:
        raise click.exceptions.Exit(BundleError.exit_code)


def _in_words(findings: list[Finding], failed: int) -> str:
    if failed:
        return f"{failed} of {len(findings)} checks failed"
    skipped = sum(finding.skipped for finding in findings)
    return "all checks hold" + (f", {skipped} could not be made" if skipped else "")


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        state = click.style("ok    ", fg="green") if finding.ok else click.style("FAILED", fg="red", bold=True)
        if finding.skipped:
            state = click.style("–     ", fg="yellow")
        click.echo(f"{state}  {finding.check:<{width}}  {finding.measured}".rstrip())
        for problem in finding.problems:
            click.echo(f"        - {problem}")
