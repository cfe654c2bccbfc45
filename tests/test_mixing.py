"""The patch mixture: what it learns of a simulated encoder is what the simulation was made with."""

import pytest
import torch
import torch.nn.functional as F

from ovs3d_nerfstudio.features.teachers import Patches, Windows
from ovs3d_nerfstudio.losses.mixing import PatchMixture
from ovs3d_nerfstudio.losses.patches import patch_distances


def simulated(prompts, weights, offset, aperture, side=16, patches=300, seed=0):
    """Two classes side by side in a window, and the embeddings of random patches of it."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(side)[None] + torch.arange(side)[:, None] > side).long().flatten()
    size = torch.randint(4, 10, (patches,), generator=generator)
    low = (torch.rand(2, patches, generator=generator) * (side - size)).long()
    place = torch.arange(side)
    rows, cols = (((place >= a[:, None]) & (place < (a + size)[:, None])).float() for a in low)
    rows, cols = rows / rows.sum(1, keepdim=True), cols / cols.sum(1, keepdim=True)
    truth = (weights[labels, None] * (prompts.T[labels] + offset)).view(side, side, -1)
    embeddings = []
    for p in range(patches):
        u = (place + 0.5 - low[0, p] - size[p] / 2) / (size[p] / 2)
        v = (place + 0.5 - low[1, p] - size[p] / 2) / (size[p] / 2)
        seen = rows[p, :, None] * cols[p] * torch.exp(-aperture * (u[:, None] ** 2 + v**2))
        embeddings.append((seen[..., None] * truth).sum((0, 1)))
    seen = Patches.joined([(rows, cols, F.normalize(torch.stack(embeddings), dim=-1))])
    return labels, Windows(torch.zeros(0, 3), torch.zeros(0), seen, side)


def test_weights_offset_and_aperture_of_an_encoder_are_found():
    prompts = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(3))).Q
    offset = 0.7 * F.normalize(torch.randn(6, generator=torch.Generator().manual_seed(4)), dim=0)
    labels, windows = simulated(prompts, torch.tensor([3.0, 1.0]), offset, aperture=1.4)
    mixture = PatchMixture()
    mixture.configure(prompts)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=1e-2)
    probabilities = F.one_hot(labels, 2).float()
    for _ in range(600):
        optimizer.zero_grad()
        loss = patch_distances([mixture.rays(probabilities)], windows, mixture.aperture)[0].mean()
        loss.backward()
        optimizer.step()
    rays = mixture.rays(torch.eye(2))
    assert loss.item() < 1e-3
    assert mixture.aperture.item() == pytest.approx(1.4, rel=0.1)
    assert (rays[0].norm() / rays[1].norm()).item() == pytest.approx(
        3 * ((prompts[:, 0] + offset).norm() / (prompts[:, 1] + offset).norm()).item(), rel=0.1
    )
    assert F.cosine_similarity(rays, prompts.T + offset, dim=-1).min() > 0.99


def test_sizes_follow_the_prompts_and_the_checkpoint_while_the_parameters_stay_the_same():
    mixture, opened = PatchMixture(), PatchMixture()
    before = list(mixture.parameters())
    mixture.configure(torch.randn(5, 3))
    assert all(a is b for a, b in zip(before, mixture.parameters(), strict=True))
    opened.load_state_dict(mixture.state_dict())
    p = torch.rand(4, 3)
    assert opened.rays(p).shape == (4, 5) and torch.equal(opened.rays(p), mixture.rays(p))
    mixture.configure(torch.zeros(5, 0))
    assert mixture.rays(torch.zeros(2, 0)).shape == (2, 5)
