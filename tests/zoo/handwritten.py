"""LightningModules as their users write them: no base class of ours, no list of blocks where theirs has none."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from tests.zoo.case import CLASSES, SEQUENCE, VOCABULARY, Case, class_id, token_ids

WIDTH = 32
FEATURES = 20


class SGDModule(L.LightningModule):
    """Plain SGD, whose update is the gradient."""

    learning_rate = 0.5

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on all trainable parameters."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


class Perceptron(SGDModule):
    """A plain nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(FEATURES, WIDTH), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        x, y = batch
        logits = self.net(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(-1) == y).float().mean())


class TransformerClassifier(SGDModule):
    """nn.TransformerEncoder, mean-pooled; accuracy by torchmetrics."""

    def __init__(self, dropout: float = 0.0, *, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        # Not ReLU: at its kink rounding decides the gradient, and three large steps of a tiny model show it.
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits. Shapes: (batch, sequence) -> (batch, classes)."""
        return self.head(self.encoder(self.embed(tokens)).mean(dim=1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        tokens, labels = batch
        loss = self.criterion(self(tokens), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


class Metered(TransformerClassifier):
    """The same with torchmetrics logged as objects."""

    def __init__(self) -> None:
        super().__init__()
        self.train_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)
        self.val_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, and accuracy over the epoch."""
        tokens, labels = batch
        logits = self(tokens)
        loss = self.criterion(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy over the set."""
        tokens, labels = batch
        self.val_accuracy.update(self(tokens), labels)
        self.log("val_accuracy", self.val_accuracy)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (batch, inner, height, width) -> (batch, outer, height / stride, width / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(SGDModule):
    """A ResNet with batch statistics and no list of blocks."""

    learning_rate = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16))
        self.layer3 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32))
        self.layer4 = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32))
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. Shape: (batch, 3, height, width) -> (batch, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss


class LSTMTagger(SGDModule):
    """Embedding, a stacked LSTM, a head on every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Next-token loss."""
        out, _ = self.lstm(self.embed(batch[:, :-1]))
        loss = F.cross_entropy(self.head(out).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train_loss", loss)
        return loss


def _double_conv(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, outer, 3, padding=1),
        nn.GroupNorm(4, outer),
        nn.ReLU(inplace=True),
        nn.Conv2d(outer, outer, 3, padding=1),
        nn.GroupNorm(4, outer),
        nn.ReLU(inplace=True),
    )


class UNet(SGDModule):
    """Skip connections from each level down to the same level up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _double_conv(3, 8), _double_conv(8, 16)
        self.bottom = _double_conv(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge2, self.merge1 = _double_conv(32, 16), _double_conv(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """An image from an image. Shape: (batch, 3, height, width)."""
        d1 = self.down1(x)
        d2 = self.down2(F.max_pool2d(d1, 2))
        x = self.bottom(F.max_pool2d(d2, 2))
        x = self.merge2(torch.cat([self.up2(x), d2], dim=1))
        x = self.merge1(torch.cat([self.up1(x), d1], dim=1))
        return self.out(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Denoising loss."""
        noisy, clean = batch
        loss = F.mse_loss(self(noisy), clean)
        self.log("train_loss", loss)
        return loss


class Block(nn.Module):
    """A pre-norm transformer block with a fused q-k-v projection, written by hand."""

    def __init__(self, width: int = WIDTH, heads: int = 4, dropout: float = 0.0, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (batch, sequence, width) -> the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + F.dropout(
            self.proj(attended.transpose(1, 2).reshape(batch, length, width)), self.dropout, self.training
        )
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class TiedLanguageModel(SGDModule):
    """A minimal GPT: the head is the embedding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(SEQUENCE, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits. Shape: (batch, sequence) -> (batch, sequence, vocabulary)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=self.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Next-token loss."""
        logits = self(batch[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Bits a token."""
        logits = self(batch[:, :-1])
        self.log("val_bits", F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1)) / 0.6931)


class FrozenBackbone(TiedLanguageModel):
    """Fine-tuning: the embedding and the first two blocks are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.wte.weight.detach().clone())
        for module in (self.wte, self.wpe, *self.blocks[:2]):
            module.requires_grad_(False)


class DirectParameters(SGDModule):
    """A small ViT: positions, class token and scales are parameters of the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.scale = nn.Parameter(torch.ones(4))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy on the class token."""
        images, labels = batch
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for i, block in enumerate(self.blocks):
            x = block(x) * self.scale[i]
        loss = F.cross_entropy(self.head(x[:, 0]) * self.logit_scale, labels)
        self.log("train_loss", loss)
        return loss


class NestedBatch(SGDModule):
    """Two inputs in a nested dict, a label with a weight, and metadata that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.features = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Weighted cross-entropy, returned in a dict."""
        inputs, target = batch["inputs"], batch["target"]
        x = self.embed(inputs["tokens"]) + self.features(inputs["dense"]["features"]).unsqueeze(1)
        logits = self.head(self.blocks(x).mean(1))
        losses = F.cross_entropy(logits, target["label"], reduction="none") * target["weight"]
        loss = losses.mean()
        self.log("train_loss", loss, batch_size=len(batch["name"]))
        return {"loss": loss, "logits": logits.detach()}


class SeveralLosses(SGDModule):
    """A main loss, an auxiliary head in the middle of the stack and a penalty on an early activation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.aux_head, self.head = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The weighted sum of three losses, each logged."""
        tokens, labels = batch
        states = [self.embed(tokens)]
        for block in self.blocks:
            states.append(block(states[-1]))
        main = F.cross_entropy(self.head(states[-1].mean(1)), labels)
        auxiliary = F.cross_entropy(self.aux_head(states[2].mean(1)), labels)
        penalty = states[1].square().mean()
        loss = main + 0.3 * auxiliary + 0.01 * penalty
        self.log_dict({"train_loss": loss, "main": main, "auxiliary": auxiliary})
        self.log("penalty", penalty, on_step=False, on_epoch=True)
        return loss


def _features_and_class(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(FEATURES, generator=generator), class_id(generator)


def _tokens_and_class(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return token_ids(generator), class_id(generator)


def _image_and_class(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 16, 16, generator=generator), class_id(generator)


def _two_images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 16, 16, generator=generator), torch.randn(3, 16, 16, generator=generator)


def _nested(generator: torch.Generator) -> dict[str, Any]:
    return {
        "inputs": {"tokens": token_ids(generator), "dense": {"features": torch.randn(FEATURES, generator=generator)}},
        "target": {"label": class_id(generator), "weight": torch.rand((), generator=generator)},
        "name": f"sample {int(class_id(generator))}",
    }


CASES = [
    Case(name="mlp", build=Perceptron, sample=_features_and_class),
    Case(name="encoder", build=TransformerClassifier, sample=_tokens_and_class),
    Case(name="encoder_norm_first", build=partial(TransformerClassifier, norm_first=True), sample=_tokens_and_class),
    Case(name="resnet", build=ResNet, sample=_image_and_class, microbatches="auto"),
    Case(name="lstm", build=LSTMTagger, sample=token_ids),
    Case(name="unet", build=UNet, sample=_two_images),
    Case(name="tied", build=TiedLanguageModel, sample=token_ids),
    Case(name="frozen", build=FrozenBackbone, sample=token_ids),
    Case(name="direct", build=DirectParameters, sample=_image_and_class),
    Case(name="nested", build=NestedBatch, sample=_nested),
    Case(name="losses", build=SeveralLosses, sample=_tokens_and_class),
    Case(name="dropout", build=partial(TiedLanguageModel, dropout=0.1), sample=token_ids, exact=False),
    Case(name="metrics", build=Metered, sample=_tokens_and_class),
]
