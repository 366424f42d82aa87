"""Other libraries of PyTorch users, the real ones: `make ecosystem` installs them; without them tests say so."""

import pytest
import torch
from torch import nn

import asyncprop as ap

MISSING = "make ecosystem installs it"


def make(seed: int = 0) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    points = torch.randn(60, 32, 16)
    return model, [(batch, batch[:, :3].argmax(1)) for batch in points]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


# They count steps in their param groups, not with each parameter: so they are refused by layer, and stepped as a block.
OPTIMIZERS = {"Lion": 1e-3, "AdaBelief": 3e-3, "RAdam": 1e-2, "Adan": 3e-3, "Lamb": 1e-2, "Tiger": 1e-3, "Prodigy": 1.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optimizers_of_pytorch_optimizer_train_as_a_block(name: str) -> None:
    library = pytest.importorskip("pytorch_optimizer", reason=MISSING)
    model, loader = make()
    optimizer = getattr(library, name)(model.parameters(), lr=OPTIMIZERS[name])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    means = []
    with ap.Engine(model, optimizer, loss_fn, update="block") as engine:
        for _ in range(3):
            losses = [step.loss for step in engine.run(loader)]
            means.append(sum(losses) / len(losses))
            scheduler.step()
    assert means[-1] < means[0]
    assert optimizer.state_dict()["state"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_by_layer_they_are_refused_and_the_way_out_is_told() -> None:
    library = pytest.importorskip("pytorch_optimizer", reason=MISSING)
    model, loader = make()
    with pytest.raises(ValueError, match=r"Lion writes 'step' of its param group\): use update='block'"):
        with ap.Engine(model, library.Lion(model.parameters()), loss_fn, update="layer") as engine:
            list(engine.run(loader))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchmetrics_score_the_model_between_runs() -> None:
    torchmetrics = pytest.importorskip("torchmetrics", reason=MISSING)
    model, loader = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
    scores = []
    with ap.Engine(model, optimizer, loss_fn) as engine:
        for _ in range(2):
            for _step in engine.run(loader):
                pass
            with torch.no_grad():
                for inputs, labels in loader:
                    metric.update(model(inputs), labels)
            scores.append(float(metric.compute()))
            metric.reset()
    right = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in loader)
    assert scores[-1] == pytest.approx(right / (60 * 32))
    assert scores[-1] > 0.8


@pytest.mark.filterwarnings("ignore")
def test_lightning_fabric_beside_ours() -> None:
    """Fabric's change to a loop, and ours. Fabric may set up the loader and the model; ours takes them as they are."""
    fabric_module = pytest.importorskip("lightning_fabric", reason=MISSING)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model, batches = make()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))  # Fabric's 1
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(batches, batch_size=None))  # Fabric's 2
    theirs = []
    for batch in loader:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        fabric.backward(loss)  # Fabric's 3
        optimizer.step()
        theirs.append(loss.item())

    model, _ = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ap.Engine(model, optimizer, loss_fn, turn="lockstep") as engine:  # ours, 1
        ours = [step.loss for step in engine.run(loader)]  # ours, 2
    assert ours == theirs  # lockstep is the plain loop, to the bit


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_with_ties_and_a_library_optimizer() -> None:
    transformers = pytest.importorskip("transformers", reason=MISSING)
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    warm = transformers.get_linear_schedule_with_warmup(optimizer, 2, 10)
    loader = [(start + torch.arange(8)) % 16 for start in torch.randint(16, (40, 16, 1))]
    with ap.Engine(model, optimizer, lambda model, ids: model(input_ids=ids, labels=ids).loss) as engine:
        losses = []
        for _ in range(3):
            losses += [step.loss for step in engine.run(loader)]
            warm.step()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert losses[-1] < losses[0] / 2
