"""The reference model: shapes, masks, gradients, and the loss against a loop in plain Python."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from trainer_ranks import synthetic_sample

from foldfeed.trainer.config import DataConfig, ModelConfig
from foldfeed.trainer.models.losses import Loss, distance_bins, distogram_loss, masked_msa_loss
from foldfeed.trainer.models.model import CompactEvoformer
from foldfeed.trainer.models.task import EvoformerTask

DATA = DataConfig(store="none", crop_residues=13, num_clusters=5, num_extra=9)
CONFIG = ModelConfig(c_m=12, c_z=8, c_e=8, num_blocks=2, num_heads=2, c_opm=3, c_tri=5, max_relative=4)
Features = dict[str, torch.Tensor]


@pytest.fixture
def model() -> CompactEvoformer:
    torch.manual_seed(1)
    return CompactEvoformer(CONFIG).eval()


def msa_loss(model: CompactEvoformer, given: Features) -> Loss:
    return Loss.of(*masked_msa_loss(model(given).msa, given))


def features(samples: tuple[int, ...] = (1, 5)) -> Features:
    made = [synthetic_sample(2, g, DATA) for g in samples]
    return {name: torch.stack([sample[name] for sample in made]) for name in made[0]}


def test_logits_have_the_shape_of_the_clustered_msa(model: CompactEvoformer) -> None:
    assert model(features()).msa.shape == (2, 5, 13, 23)
    assert model(features((3,))).msa.shape == (1, 5, 13, 23)


def with_garbage_in_padding(given: Features) -> Features:
    """Replaces everything under a zero mask by other, legal values."""
    draw = torch.Generator().manual_seed(9)
    seq, msa, extra = given["seq_mask"] > 0, given["msa_mask"] > 0, given["extra_msa_mask"] > 0
    noisy = dict(given)

    def fill(name: str, mask: torch.Tensor, high: int = 0) -> None:
        shape = given[name].shape
        garbage = (
            torch.randint(0, high, shape, generator=draw) if high else 50 * torch.rand(shape, generator=draw)
        )
        noisy[name] = torch.where(mask if mask.dim() == len(shape) else mask[..., None], given[name], garbage)

    fill("target_feat", seq)
    fill("residue_index", seq, 90)
    fill("msa_feat", msa)
    fill("extra_msa", extra, 23)
    fill("extra_has_deletion", extra)
    fill("extra_deletion_value", extra)
    fill("true_msa", msa, 23)
    return noisy


def test_values_under_a_zero_mask_change_nothing(model: CompactEvoformer) -> None:
    given = features()
    assert (given["seq_mask"] == 0).any()
    assert (given["msa_mask"].amax(-1) == 0).any(), "the data must have padded rows"
    noisy = with_garbage_in_padding(given)
    keep = given["msa_mask"] > 0
    assert torch.equal(model(given).msa[keep], model(noisy).msa[keep])
    clean, dirty = msa_loss(model, given), msa_loss(model, noisy)
    assert torch.equal(clean.total, dirty.total)
    clean.total.backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    dirty.total.backward()
    for gradient, param in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(gradient, param.grad, atol=1e-7)


def test_more_padding_changes_nothing(model: CompactEvoformer) -> None:
    given = features()

    def pad(tensor: torch.Tensor, name: str) -> torch.Tensor:
        residue_axis = {"target_feat": 1, "residue_index": 1, "aatype": 1, "seq_mask": 1}.get(name, 2)
        grown = list(tensor.shape)
        grown[residue_axis] += 3
        if residue_axis == 2:
            grown[1] += 2
        larger = tensor.new_zeros(grown)
        larger[tuple(slice(0, size) for size in tensor.shape)] = tensor
        return larger

    padded = {name: pad(tensor, name) for name, tensor in given.items()}
    small, large = model(given).msa, model(padded).msa
    keep = given["msa_mask"] > 0
    assert torch.allclose(small[keep], large[:, :5, :13][keep], atol=2e-5)
    assert torch.allclose(
        masked_msa_loss(small, given).values, masked_msa_loss(large, padded).values, atol=1e-5
    )


def test_every_parameter_gets_a_gradient(model: CompactEvoformer) -> None:
    given = features()
    msa_loss(model, given).total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


@pytest.mark.parametrize("name", ["extra_msa", "extra_has_deletion", "extra_deletion_value", "residue_index"])
def test_the_model_reads_every_feature(model: CompactEvoformer, name: str) -> None:
    given = features()
    changed = dict(given)
    if name == "residue_index":
        changed[name] = given[name] * 2
    else:
        changed[name] = ((given[name] + 1) * given["extra_msa_mask"]).to(given[name].dtype)
    assert not torch.equal(model(given).msa, model(changed).msa)


def test_samples_of_a_batch_do_not_mix(model: CompactEvoformer) -> None:
    both, alone = model(features((1, 5))).msa, model(features((5,))).msa
    assert torch.allclose(both[1], alone[0], atol=1e-5)


def test_the_loss_is_a_mean_per_sample_summed_over_counted_samples(model: CompactEvoformer) -> None:
    given = features((1, 2, 5))
    given["bert_mask"][1] = 0.0
    logits = model(given).msa
    loss = Loss.of(*masked_msa_loss(logits, given))
    expected = []
    for sample in (0, 2):
        values = [
            -torch.log_softmax(logits[sample, row, res], -1)[given["true_msa"][sample, row, res]].item()
            for row in range(5)
            for res in range(13)
            if given["bert_mask"][sample, row, res]
        ]
        expected.append(sum(values) / len(values))
    assert loss.num_samples.item() == 2
    assert loss.total.item() == pytest.approx(sum(expected), rel=1e-5)
    assert loss.per_sample.tolist() == pytest.approx([expected[0], 0.0, expected[1]], rel=1e-5)


def test_dropout_is_on_in_training_only_and_follows_the_seed(model: CompactEvoformer) -> None:
    given = features()
    assert torch.equal(model(given).msa, model(given).msa)
    model.train()
    torch.manual_seed(4)
    first = model(given).msa
    second = model(given).msa
    torch.manual_seed(4)
    assert not torch.equal(first, second)
    assert torch.equal(first, model(given).msa)


def with_structures(given: Features) -> Features:
    """Adds positions on a random walk; the second sample has none."""
    walk = torch.randn(2, 13, 3, generator=torch.Generator().manual_seed(3)).cumsum(1) * 3.0
    mask = given["seq_mask"].clone()
    mask[0, 4] = 0.0
    mask[1] = 0.0
    return {**given, "pseudo_beta": walk * mask[..., None], "pseudo_beta_mask": mask}


def test_bins_of_distances_are_those_of_the_supplement() -> None:
    # SI 1.9.8 and AlphaFold 2's `distogram_loss`: 63 breaks from 2.3125 to 21.6875 angstrom, 0.3125 apart.
    distances = torch.tensor([0.0, 2.3, 2.32, 2.63, 3.0, 21.68, 21.69, 500.0])
    positions = torch.zeros(1, 9, 3)
    positions[0, 1:, 2] = distances
    assert distance_bins(positions)[0, 0, 1:].tolist() == [0, 0, 1, 2, 3, 62, 63, 63]


def test_the_distogram_loss_is_a_mean_over_the_pairs_that_are_known() -> None:
    given = with_structures(features())
    logits = torch.randn(2, 13, 13, 64, generator=torch.Generator().manual_seed(5))
    found = distogram_loss(logits, given)
    known = [i for i in range(13) if given["pseudo_beta_mask"][0, i]]
    assert 4 not in known
    errors = []
    for i in known:
        for j in known:
            distance = (given["pseudo_beta"][0, i] - given["pseudo_beta"][0, j]).double().norm().item()
            bin_ = sum(distance > 2.3125 + 0.3125 * k for k in range(63))
            errors.append(-torch.log_softmax(logits[0, i, j].double(), -1)[bin_].item())
    assert found.counted.tolist() == [True, False]
    assert found.values.tolist() == pytest.approx([sum(errors) / len(errors), 0.0], rel=1e-5)
    noisy = dict(
        given, pseudo_beta=torch.where(given["pseudo_beta_mask"][..., None] > 0, given["pseudo_beta"], 7.0)
    )
    assert torch.equal(distogram_loss(logits, noisy).values, found.values)


def test_a_distogram_head_is_symmetric_learns_and_leaves_the_other_weights_as_they_were() -> None:
    config = dataclasses.replace(CONFIG, distogram_weight=0.3)
    torch.manual_seed(1)
    model = CompactEvoformer(config)
    torch.manual_seed(1)
    plain = dict(CompactEvoformer(CONFIG).named_parameters())
    new = [name for name, _ in model.named_parameters() if name not in plain]
    assert new == ["distogram.weight", "distogram.bias"]
    assert all(torch.equal(plain[name], p) for name, p in model.named_parameters() if name in plain)
    task, given = EvoformerTask(config), with_structures(features())
    loss = task.loss(model, given)
    assert set(loss.parts) == set(task.parts) == {"masked_msa", "distogram"}
    parts = loss.parts["masked_msa"].values + 0.3 * loss.parts["distogram"].values
    assert torch.allclose(loss.per_sample, parts)
    loss.total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    distances = model.eval()(given).distogram
    assert distances.shape == (2, 13, 13, 64)
    assert torch.equal(distances, distances.transpose(1, 2))


def test_a_sample_counts_when_one_of_its_losses_says_something() -> None:
    given = with_structures(features())
    given["bert_mask"] = torch.zeros_like(given["bert_mask"])
    config = dataclasses.replace(CONFIG, distogram_weight=0.3)
    torch.manual_seed(1)
    loss = EvoformerTask(config).loss(CompactEvoformer(config), given)
    assert loss.counted.tolist() == [True, False]
    assert loss.per_sample[1] == 0
    assert loss.num_samples == 1
