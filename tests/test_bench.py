"`pcvae bench` at tiny sizes: its equality checks, verdicts, exit status and JSON. Nothing here depends on a time."
import json
from dataclasses import replace

import pytest
import torch

from pcvae import bench, cli
from pcvae.bench import (BUSY, COLUMNS, PATHS, SMALL_PIXELCNN, agree, agree_where_alive, broadcast_critic, broadcast_log_aggregate, judge, main, noise_for, pixel_loss,
                         plain_pixel_loss, run_bench, same_counts, trained_like, warm_pixelcnn, wrong_pixels)
from pcvae.critics import self_critic_loss
from pcvae.gaussian import log_aggregate

TINY = {name: spec.tiny for name, spec in PATHS.items()}
KEYS = ["name", "ratio", "goal", "met", "equal", "note"]


@pytest.fixture
def small(monkeypatch):
    "The command at tiny sizes, where every goal is met and the machine is quiet."
    for name, spec in PATHS.items():
        build = spec.build
        monkeypatch.setitem(PATHS, name, replace(spec, build=lambda _b=build, _s=spec.tiny, **_: _b(**_s), goal=0., limit=None, memory=()))
    monkeypatch.setattr(bench.Load, "others", lambda self: 0.0)


def rows(text): return [json.loads(line) for line in text.splitlines()]


# --- plain forms --------------------------------------------------------------------------------------------------------
def test_broadcast_forms_are_the_textbook():
    q, z = trained_like(12, 3, std=0.7)
    q, z = q.to(torch.float64), z.double()
    pairs = torch.stack([torch.stack([torch.distributions.Normal(m, s).log_prob(c).sum() for m, s in zip(q.mean, q.std)]) for c in z])
    assert torch.allclose(broadcast_log_aggregate(z, q, 5), pairs.logsumexp(1) - torch.tensor(12.).double().log())
    assert torch.allclose(broadcast_log_aggregate(z, q), log_aggregate(z, q))
    assert torch.allclose(broadcast_critic(z, q), (pairs.logsumexp(1) - pairs.diagonal()).mean())
    assert torch.allclose(broadcast_critic(z, q), self_critic_loss(z, q))


@pytest.mark.parametrize("name", [n for n in PATHS if not PATHS[n].needs])
def test_both_forms_agree(name):
    row = run_bench(name, repeats=1, sizes=TINY, memory=False).iloc[0]
    assert row.equal is True and row.ratio > 0 and row.peer_cpu > 0


def test_density_and_coverage_count_as_prdc_does():
    pytest.importorskip("prdc")
    assert run_bench("density_coverage", repeats=1, sizes=TINY, memory=False).equal[0] is True


# --- equality can fail --------------------------------------------------------------------------------------------------
def test_a_wrong_value_is_noticed():
    job = bench.mi(**PATHS["mi"].tiny)
    value, plain = job.ours(), job.peer()
    assert job.equal(value, plain)[0]
    for wrong in (value.value + 1e-4, float("nan")): assert not job.equal(replace(value, value=wrong), plain)[0]
    for wrong in (plain + 1e-3, plain * float("nan")): assert not job.equal(value, wrong)[0]


def test_a_wrong_gradient_is_noticed():
    loss, grad = torch.tensor(1.), torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert agree([loss, grad], [loss, grad], 1e-4)[0]
    assert not agree([loss, grad], [loss, grad + 1e-3], 1e-4)[0]
    assert not agree([loss * float("nan"), grad], [loss, grad], 1e-4)[0]
    assert not agree([loss, grad * float("nan")], [loss, grad], 1e-4)[0]
    with pytest.raises(ValueError): agree([loss, grad], [loss], 1e-4)


def test_one_item_more_is_noticed():
    counts = torch.tensor([0, 2, 3, 1])
    assert same_counts(counts, dict(density=6 / 8, coverage=3 / 4), m=4, k=2)[0]
    assert not same_counts(counts, dict(density=7 / 8, coverage=3 / 4), m=4, k=2)[0]
    assert not same_counts(counts, dict(density=6 / 8, coverage=4 / 4), m=4, k=2)[0]


def test_the_plain_pixelcnn_has_the_default_layout_throughout():
    "Else the yardstick would share the layout that it is to be compared with."
    vae, x, z = warm_pixelcnn(4, **SMALL_PIXELCNN)
    for loss, form, fmt in ((plain_pixel_loss, bench.dense_form(vae.decoder), torch.contiguous_format), (pixel_loss, vae.decoder, torch.channels_last)):
        hooks = [m.register_forward_hook(lambda m, i, out: seen.append(out.is_contiguous(memory_format=fmt))) for m in form.net.blocks]
        seen = []
        value = loss(form, z, x)
        assert len(seen) == 3 and all(seen)
        for h in hooks: h.remove()
    assert value > 1


def test_a_wrong_pixelcnn_gradient_is_noticed_and_a_dead_one_too():
    g = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 2, 2, 3, generator=g)
    whole = torch.cat([kernel, torch.zeros(3, 2, 1, 3)], 2)
    loss, bias = torch.tensor(2.), torch.randn(4, generator=g)
    assert agree_where_alive([loss, kernel, bias], [loss, whole, bias], 1e-4)[0]
    dead = whole.clone(); dead[0, 0, 2, 1] = 1e-6
    assert agree_where_alive([loss, kernel, bias], [loss, dead, bias], 1e-4) == (False, "a dead weight has a gradient")
    live = whole.clone(); live[0, 0, 1, 1] += 0.1
    assert not agree_where_alive([loss, kernel, bias], [loss, live, bias], 1e-4)[0]
    assert not agree_where_alive([loss, kernel, bias * float("nan")], [loss, whole, bias], 1e-4)[0]


@pytest.mark.parametrize("kind", ["resid13", "plain"])
def test_one_pass_over_the_finished_images_decides_as_all_passes_do(kind):
    vae, _, z = warm_pixelcnn(6, **{**SMALL_PIXELCNN, "kind": kind})
    eps, decoder = noise_for(z, 8), vae.eval().decoder
    naive = bench.generate_naive(decoder, z, lambda shape: eps)
    assert 0 < naive.mean() < 1 and wrong_pixels(decoder, z, eps, naive) == 0
    assert torch.equal(decoder.generate(z, lambda shape: eps), naive)
    for i in range(64):
        images = naive.flatten(1).clone()
        images[0, i] = 1 - images[0, i]
        assert wrong_pixels(decoder, z, eps, images.view_as(naive)) > 0


def test_sampling_that_differs_on_small_images_alone_is_noticed(small, monkeypatch):
    job = bench.pixelcnn_sampling(**TINY["pixelcnn_sampling"])
    assert job.equal(job.ours(), None)[0] and job.share == 1 / 64
    monkeypatch.setattr(bench, "generate_naive", lambda *a, f=bench.generate_naive: 1 - f(*a))
    equal, found = job.equal(job.ours(), None)
    assert not equal and "small images differ" in found


# --- verdict and exit status --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio, others, memory, met", [
    (60, 0.0, 5, True), (60, 1.9, 5, True), (60, None, None, True), (59.9, 0.19, 5, False), (59.9, BUSY, 5, None), (59.9, 1.9, 5, None),
    (59.9, None, 5, None), (90, 0.0, 32.5, False), (90, 1.9, 32.5, False), (90, None, 32.0, True)])
def test_verdict(ratio, others, memory, met):
    verdict, note = judge(ratio, 60, others, memory, limit=32)
    assert verdict is met and bool(note) == (met is not True)


def test_status_0_and_one_object_a_path(small, capsys):
    assert main(["--json", "--repeats", "1"]) == 0
    out = capsys.readouterr()
    found = rows(out.out)
    assert [r["name"] for r in found] == list(PATHS)
    assert all(list(r)[:6] == KEYS and list(r) == list(COLUMNS) for r in found)
    assert all(r["met"] is True and r["equal"] is True for r in found if "skipped" not in r["note"])
    assert "other processes used" in out.err


def test_status_1_for_a_goal_missed_on_a_quiet_machine_only(small, monkeypatch, capsys):
    monkeypatch.setitem(PATHS, "self_critic", replace(PATHS["self_critic"], goal=1e9))
    assert main(["--json", "--only", "self_critic", "--repeats", "1"]) == 1
    assert rows(capsys.readouterr().out)[0]["met"] is False
    monkeypatch.setattr(bench.Load, "others", lambda self: 1.4)
    assert main(["--json", "--only", "self_critic", "--repeats", "1"]) == 0
    row = rows(capsys.readouterr().out)[0]
    assert row["met"] is None and "not judged: other processes used 1.4 cores" in row["note"]


def test_status_1_for_values_that_differ_and_no_ratio(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "plain_elbo", lambda model, x, eps, f=bench.plain_elbo: 1.01 * f(model, x, eps))
    assert main(["--json", "--only", "toy_epoch", "--repeats", "1"]) == 1
    row = rows(capsys.readouterr().out)[0]
    assert row["equal"] is False and row["ratio"] is None and row["met"] is None and "values differ" in row["note"]
    assert main(["--only", "toy_epoch", "--repeats", "1"]) == 1 and "values differ" in capsys.readouterr().out


def test_a_missing_package_skips_its_path_and_says_so(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert main(["--json", "--only", "density_coverage"]) == 0
    row = rows(capsys.readouterr().out)[0]
    assert (row["ratio"], row["met"], row["equal"]) == (None, None, None)
    assert "prdc is not installed" in row["note"] and "pcvae[bench]" in row["note"]


def test_text_tells_ratio_goal_and_load(small, capsys):
    assert main(["--only", "self_critic", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "self_critic" in out and "goal" in out and "quiet enough" in out


@pytest.mark.parametrize("argv, message", [
    (["--only", "density"], "Did you mean 'density_coverage'?"), (["--repeats", "0"], "--repeats 0 should be at least 1"),
    (["--repeats", "three"], "invalid int value"), (["--fast"], "unrecognized arguments: --fast")])
def test_bad_input_is_one_line_and_status_2(argv, message, capsys):
    assert cli.main(["bench", *argv]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1 and message in out.err


# --- memory, global state -----------------------------------------------------------------------------------------------
def test_a_memory_reading_that_fails_says_why():
    with pytest.raises(RuntimeError, match="memory of mi.*unexpected keyword"): bench.memory_of("mi", "ours", dict(nn=3))


def test_nothing_global_is_changed():
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    run_bench("toy_epoch", repeats=1, sizes=TINY, memory=False)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before[:2] and torch.equal(torch.get_rng_state(), before[2])
