"""report.md of `bench.routed_training`."""

from typing import Any

TITLES = {
    "loss/mean": "loss", "margin/mean": "margin, nats", "accuracy/frac": "reward accuracy", "accuracy/tied_frac": "reward accuracy",
    "likelier/frac": "chosen likelier", "weight/mean": "importance weight", "grad_norm": "gradient norm",
}  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    return "\n".join(
        [
            *head_lines(report),
            *curve_lines(report),
            *bias_lines(report),
            *movement_lines(report),
            *ageing_lines(report),
        ]
    )


def head_lines(report: dict[str, Any]) -> list[str]:
    about, data, s, routed = report["device"], report["data"], report["settings"], report["routed"]
    return [
        "# Routed gradients in training",
        "",
        f"{about['cpu']}, {about['threads']} threads, {s['device']}; torch {report['versions']['torch']}; commit {report['commit']}; "
        f"{report['date']}.",
        f"`{' '.join(report['command'])}`",
        "",
        f"{report['model']}, IS-DPO (beta 0.1), {s['steps']} steps of {s['pairs_per_step']} pairs, lr {s['lr']:g}; {data['file']}: "
        f"{data['records']} records, {data['train']} pairs to train on and {data['heldout']} held out, those whose last question has at "
        f"most {s['max_prompt_length']} tokens, their answers cut; "
        f"{data['tokens_a_pair']:.0f} tokens a pair, {data['scored_a_pair']:.0f} of them scored, at most {s['max_length']} a sequence.",
        f"Routed(tolerance={routed['tolerance']:g}, block={routed['block']}, row_share={routed['row_share']:g}), order of the vocabulary "
        "made before training; scale as the trainer passes it.",
    ]


def curve_lines(report: dict[str, Any]) -> list[str]:
    """The difference of two runs, root mean square over the steps."""
    lines = [
        "", "## Curves", "",
        "Difference of two runs, root mean square over the steps (held out: over the evaluations). Seeds: the two exact runs of the three "
        "that are nearest to each other, and those that are farthest apart.",
        "", "| metric | exact, routed, same seed | exact, other seeds: nearest | farthest | routed / nearest |",
        "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in report["curves"]:
        title = f"{'held-out' if row['kind'] == 'heldout' else 'training'} {TITLES[row['metric']]}"
        near, far = min(row["seeds"]), max(row["seeds"])
        lines.append(f"| {title} | {row['routed']:.2g} | {near:.2g} | {far:.2g} | {ratio(row['routed'], near)} |")
    lines += [
        "",
        "| at the end, held out | " + " | ".join(report["runs"]) + " |",
        "|---" + "|---:" * len(report["runs"]) + "|",
    ]
    for name in ("loss/mean", "margin/mean", "accuracy/tied_frac", "weight/mean"):
        cells = [f"{run['heldout'][-1][name]:.4f}" for run in report["runs"].values()]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return lines


def bias_lines(report: dict[str, Any]) -> list[str]:
    found = report["gradients"]
    n = found["head"]["batches"]
    least, most = found["coefficient"]["least"], found["coefficient"]["most"]
    lines = [
        "", f"## Bias: gradients of {n} micro-batches after step {report['middle_step']}", "",
        f"{report['settings']['pairs_per_batch']} pairs each, importance weights and coefficients those of the policy there (a pair's "
        f"coefficient: {least:.2g} to {most:.2g} times that of a pair at the reference). Relative Frobenius errors. Growth: norm of the "
        f"sum over the root of the sum of squared norms, 1 for independent noise, {n**0.5:.3g} for what is the same every time. Bias: the "
        "error that is left of the mean of ever more such batches, estimated without what averages out; where the growth of the error is "
        "within what random signs of its terms would give (95 % chance), it cannot be told from 0.",
        "", "| | head | all below |", "|---|---:|---:|",
    ]  # fmt: skip
    rows = (
        ("error of one micro-batch: mean", "error_single"), ("median", "error_median"),
        ("root of sum of squares, relative to that of the gradients", "error_pooled"),
        ("error of the sum", "error_sum"), ("error of the sum / mean error of one", "ratio"),
        ("1 / root of the number of micro-batches", "ratio_of_noise"),
        ("growth of the error", "growth_error"), ("95 % chance", "growth_error_chance"),
        ("growth of the gradient", "growth_gradient"), ("95 % chance", "growth_gradient_chance"),
        ("bias", "bias"), ("error of the sum / sampling error of the sum", "error_by_sampling"),
        ("micro-batches after which the bias is as large as the sampling error", "batches_until_bias"),
    )  # fmt: skip
    lines += [f"| {title} | {number(found['head'][key])} | {number(found['body'][key])} |" for title, key in rows]
    one, total = (cosines(found["head"][key]) for key in ("cosines_single", "cosines_sum"))
    return [
        *lines,
        "",
        f"Gradient of the hidden states of one micro-batch: error {errors(found['hidden'])} (root of sum of squares, median, mean). "
        f"Cosines of the head's rows at the 5/25/50 % quantiles: {one} in one micro-batch (mean), {total} in the sum.",
    ]


def movement_lines(report: dict[str, Any]) -> list[str]:
    adam = report["adam"]
    lines = [
        "", "## Adam", "",
        f"How the parameters moved, against an exact run: norm of the difference over the norm of the movement. From one checkpoint: "
        f"{adam['steps']} steps at a constant rate after step {report['middle_step']}, Adam's moments included. Whole run: "
        f"{report['settings']['steps']} steps from the untrained model. Head: rows of the {adam['seen_words']} words of the training "
        "texts, and the others, which move by their probability alone. Log-probs: of held-out answers, root mean square of the "
        "difference, and of the way that they went themselves.",
        "", "| | head, seen words | other words | below | all: cosine | head's row cosines 5/25/50 % | log-probs, nats |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    rows = [
        ("from one checkpoint, routed", adam["routed"]),
        ("from one checkpoint, exact, pairs one by one: rounding alone", adam["one by one"]),
        ("from one checkpoint, exact, other order of the pairs", adam["other order"]),
        *((f"whole run, {name}", parts) for name, parts in report["movement"].items()),
    ]
    for title, parts in rows:
        cells = [number(parts[part]["difference"]) for part in ("seen", "unseen", "body")]
        logprob = f"{number(parts['logprob']['difference'])} of {number(parts['logprob']['way'])}"
        cells += [f"{parts['all']['cosine']:.5f}", cosines(parts["cosines"]), logprob]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def ageing_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        "", "## Ageing of the order of the vocabulary", "",
        f"At the policies of the exact run, means over {report['settings']['ageing_batches']} micro-batches; share: of all (token, block) "
        "pairs, those routed in the gradient of the hidden states and in that of the head. Errors of single gradients: root of sum of "
        "squares, median, mean.",
        "", "| policy | order | share d_hidden | share d_weight | error d_hidden | error d_weight | row cosines 5/25/50 % |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in report["ageing"]:
        shares = f"{row['share_hidden']:.4f} | {row['share_weight']:.4f}"
        both = f"{errors(row['error_hidden'])} | {errors(row['error_weight'])}"
        lines.append(f"| {row['when']} | {row['order']} | {shares} | {both} | {cosines(row['cosines'])} |")
    return [*lines, ""]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def errors(found: dict[str, float]) -> str:
    return " / ".join(f"{found[name]:.1e}" for name in ("error_pooled", "error_median", "error_single"))


def ratio(a: float, b: float) -> str:
    return f"{a / b:.3f}" if b > 0 else ""


def cosines(values: list[float]) -> str:
    return "/".join(f"{value:.3f}" for value in values)
