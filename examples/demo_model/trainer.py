"""One training step of the demo model, its schedule, and the state that a run goes on from."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, layer_norm, normalize
from transformers import Qwen2VLForConditionalGeneration

from .conversation import IGNORED
from .dataset import NUM_CLASSES, PLACE_CLASSES, PLACE_COLUMNS, SPARSE_READOUTS, Batch
from .model import TEXT_WIDTH, CellHeads
from .validate import forward_text, forward_tower

TEXT_WEIGHT = 2.0
CELL_WEIGHT = 1.0
PLACE_WEIGHT = 0.3
FALL_PART = 0.12
WORD_SHARPNESS = 12.0
WordIds = tuple[list[int], list[int]]


class Trainer:
    """Own model, heads and optimizer, and take training steps.

    Args:
        model: Model to train, in float32.
        learning_rate: Peak of the schedule.
        word_ids: Tokens of the names of colours and shapes.
        use_bfloat16: Whether products of matrices run in bfloat16.
        freezes_tower: Whether the tower stays as it is, up to its merger.
    """

    def __init__(
        self,
        model: Qwen2VLForConditionalGeneration,
        learning_rate: float,
        word_ids: WordIds,
        use_bfloat16: bool = False,
        freezes_tower: bool = False,
    ) -> None:
        self.model = model
        self.heads = CellHeads(NUM_CLASSES, TEXT_WIDTH, SPARSE_READOUTS)
        self.place_heads = CellHeads(PLACE_CLASSES, TEXT_WIDTH, (2,))
        self.step = 0
        self._peak = learning_rate
        self._word_ids = word_ids
        self._use_bfloat16 = use_bfloat16
        for part in (model.model.visual.patch_embed, model.model.visual.blocks):
            part.requires_grad_(not freezes_tower)
        parameters = [*model.parameters(), *self.heads.parameters()]
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": 0.03},
            {"params": vectors, "weight_decay": 0.0},
            {"params": list(self.place_heads.parameters()), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)

    def train_step(
        self, batch: Batch, total_steps: int, with_text: bool = True
    ) -> tuple[float, float]:
        """Update the weights once.

        Args:
            batch: Data of the step.
            total_steps: Length of the schedule.
            with_text: Whether the language model runs; if not, only the tower learns.

        Returns:
            Loss per answer token (0 without text), and loss of the cells.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._peak * schedule(self.step, total_steps)
        loss, text_loss, cell_loss = self._losses(batch, with_text)
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.step += 1
        return float(text_loss.detach()), float(cell_loss.detach())

    def _losses(self, batch: Batch, with_text: bool) -> tuple[torch.Tensor, ...]:
        """Return what is minimised, the loss of the answers and the loss of the cells."""
        text_loss = cell_loss = place_loss = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16, enabled=self._use_bfloat16):
            cells = forward_tower(self.model, batch)
            if cells is not None:
                cell_loss = self.heads(cells.float(), batch.cell_labels[:, : len(NUM_CLASSES)])
            if with_text:
                hidden, middle = forward_text(self.model, batch, cells)
                is_target = batch.targets != IGNORED
                logits = self.model.lm_head(hidden[is_target]).float()
                text_loss = cross_entropy(logits, batch.targets[is_target])
                place_loss = self._place_loss(batch, middle) + self._word_loss(batch, cells)
        if not with_text:
            return cell_loss, text_loss, cell_loss
        loss = TEXT_WEIGHT * text_loss + CELL_WEIGHT * cell_loss + PLACE_WEIGHT * place_loss
        return loss, text_loss, cell_loss

    def _place_loss(self, batch: Batch, middle: torch.Tensor) -> torch.Tensor:
        if not batch.pictures:
            return torch.zeros(())
        is_picture = batch.token_ids == self.model.config.image_token_id
        cells = layer_norm(middle[is_picture].float(), (TEXT_WIDTH,))
        loss: torch.Tensor = self.place_heads(cells, batch.cell_labels[:, PLACE_COLUMNS])
        return loss

    def _word_loss(self, batch: Batch, cells: torch.Tensor | None) -> torch.Tensor:
        """Pull what the tower says of an item towards the words that name it.

        A question names a colour or a shape, and attention finds the cells that show it more
        easily when both lie in one space.
        """
        if cells is None:
            return torch.zeros(())
        words: torch.Tensor = self.model.model.language_model.embed_tokens.weight
        shows_item = batch.cell_labels[:, 0] > 0
        shown = normalize(cells[shows_item].float(), dim=-1)
        losses = [
            cross_entropy(
                WORD_SHARPNESS * shown @ normalize(words[ids], dim=-1).T,
                batch.cell_labels[shows_item, column] - 1,
            )
            for column, ids in enumerate(self._word_ids)
        ]
        return torch.stack(losses).sum()

    def save(self, path: Path) -> None:
        """Write everything that going on needs; the old file stays until the new one is whole."""
        tensors = {f"model.{name}": one for name, one in self.model.state_dict().items()}
        tensors |= {f"heads.{name}": one for name, one in self.heads.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": one for name, one in moments.items()}
        tensors |= {f"place.{name}": one for name, one in self.place_heads.state_dict().items()}
        tensors["step"] = torch.tensor(self.step)
        partial = path.with_suffix(".partial")
        save_file({name: one.clone().contiguous() for name, one in tensors.items()}, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Go on from what ``save`` wrote."""
        tensors = load_file(path)
        self.step = int(tensors["step"])
        self.model.load_state_dict(_below("model", tensors))
        self.heads.load_state_dict(_below("heads", tensors))
        self.place_heads.load_state_dict(_below("place", tensors))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below("optimizer", tensors).items():
            index, field = name.split(".")
            moments.setdefault(int(index), {})[field] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def schedule(step: int, total_steps: int) -> float:
    """Return the part of the peak learning rate: a linear rise, level, then a linear fall."""
    warmup = min(300, total_steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    left = (total_steps - step) / (FALL_PART * total_steps)
    return max(0.01, min(1.0, left))


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = f"{prefix}."
    return {
        name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)
    }
