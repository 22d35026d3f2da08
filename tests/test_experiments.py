"""The experiments still run on the code as it is now: the bench at toy size, the command lines of the evidence."""
import doctest
import re

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from experiments import bench, evidence                                     # noqa: E402


@pytest.fixture
def short(policy, monkeypatch):
    """The policy, with answers of 6 tokens in the bench."""
    monkeypatch.setattr(bench, "NEW_TOKENS", 6)
    monkeypatch.setattr(policy.S, "MAX_NEW_TOKENS", 6)
    return policy


def test_bench_of_rollout_and_packing(short, contexts, monkeypatch):
    monkeypatch.setattr(bench, "PROMPT_LENGTHS", (64,))
    monkeypatch.setattr(bench, "compare_peaks", lambda row, ways, length, threads: None)
    result = {}
    bench.bench_rollout(short, contexts[:2], result, 1)
    bench.bench_packing(short, contexts[:1], result, 1, 1)
    assert set(result) == {"rollout, 1 contexts", "rollout, 2 contexts", "packed row, toy world",
                           "packed row, prompt of 64"}
    for row in result.values():
        [gain] = [row[name] for name in row if name.startswith("over_")]
        assert 0 < gain["low"] <= gain["ratio"] <= gain["high"] and row["tokens_per_s"] > 0


def test_bench_of_the_judge(short, contexts, monkeypatch):
    monkeypatch.setattr(bench, "JUDGE_LENGTH", 60)
    result = {}
    bench.bench_judge(short, contexts[2:], result, 1)
    assert set(result) == {"judge, toy world", "judge, prompt of 60"}
    assert all(row["verdicts_per_s"] > 0 and row["over_one by one"]["ratio"] > 0 for row in result.values())


def test_all_ways_of_the_bench_compute_the_same_gradient(short):
    prompt = bench.text_prompt(short, 30)
    gradients = []
    with bench.new_lora(short) as params, bench.encoded_prompts(short):
        torch.nn.init.normal_(params[1], std=0.05)                          # else a new LoRA's A has no gradient
        for way in bench.ways_to_train(short, prompt).values():
            short.model.zero_grad(set_to_none=True)
            way()
            gradients.append(torch.cat([p.grad.flatten() for p in params]))
    assert gradients[0].norm() > 0
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-3 * gradients[0].norm()


def test_bench_of_experts():
    pytest.importorskip("bitsandbytes")
    experts = bench.Experts()
    x = torch.randn(3, experts.hidden_dim)
    chosen = torch.stack([torch.randperm(experts.num_experts)[:experts.experts_per_token] for _ in range(3)])
    share = torch.full(chosen.shape, 1 / experts.experts_per_token)
    from support.weights import packed_experts
    with torch.no_grad():
        expected = experts.plain(x, chosen, share, experts.unpacked())
        assert torch.allclose(packed_experts(experts, x, chosen, share), expected, atol=1e-5)


def test_our_steps_beside_trl(short):
    assert len(bench.our_steps(short, [20, 30], 2)) == 1


def test_command_lines_of_the_evidence_parse():
    lines = [*evidence.MAIN, *(evidence.PHASE2 + more for more in evidence.VARIANTS.values())]
    lines += [f"02 --RUN={{run}} --FROM={{run}} {flag}" for flag in evidence.ABLATIONS.values()]
    lines += ["06 --RUN={run} --FROM={run} --METHODS=base,phase1"]
    for line in lines:
        number, *arguments = line.format(run="s0", norm="0.3").split()
        script = evidence.script_of(number)
        assert re.fullmatch(rf"{number}_\w+\.py", script)
        common.settings(vars(common.stage(script.removesuffix(".py"))), arguments)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(evidence).failed == 0


def test_figures_of_the_evidence_by_hand():
    """Two seeds: what is deployed is told apart from what was written in the same contexts; leads are paired by seed."""
    def record(seed, phase1, base):
        judged = {"phase1 all": {"fully_right": phase1, "tokens": 12.0}, "base all": {"fully_right": base, "tokens": 16.0}}
        low = {row: {name: value / 2 for name, value in of_row.items()} for row, of_row in judged.items()}
        rows = {"base+prompt all": {"accuracy": 0.3 + seed / 10}, "dpo-steer all": {"accuracy": 0.5 + seed / 10},
                "phase1 all": {"accuracy": 0.4}, "base all": {"accuracy": 0.35}}
        gains = {"phase1": {"over_base": {"accuracy": 5.0, "precision": 10.0}}}
        results = {"rows": rows, "deployed": judged, "validation": low, "gains": gains, "repeats": {"phase1": 0.1}}
        reward = {name: {"mean": 0.9} for name in ("pair_accuracy", "shuffled_accuracy")}
        return {"seed": seed, "variant": "main", "results": results, "reward": reward}
    F = evidence.figures([record(0, 0.8, 0.4), record(1, 0.9, 0.4)])
    assert F["phase1.fully_right.deployed"]["mean"] == F["phase1.fully_right.deployed.phase1"]["mean"] == 0.85
    assert F["phase1.fully_right.same_contexts"]["mean"] == 0.425 and F["phase1.repeats.deployed"]["mean"] == 0.1
    assert F["phase2.gain_over_prompt"] == {"mean": 20.0, "low": 20.0, "high": 20.0, "n": 2}
    assert F["phase1.tokens_ratio.deployed"]["mean"] == 0.75 and F["phase1.gain_over_base"]["mean"] == 5.0
    effects = {row.split(" | ")[0]: row for row in evidence.table_of_effects(F).splitlines()}
    assert effects["| Phase One over base"].endswith("| 5.0 (5.0 to 5.0) | same |")
