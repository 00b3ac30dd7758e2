"""Unmodified transformers architectures with tiny random configurations; nothing is downloaded.

Four layers each, so that two ranks with two virtual stages each can be filled; four heads, two of them key-value heads
where the architecture has them; no dropout; every token has a label, so that a mean of microbatch means is the mean.
"""

from __future__ import annotations

from tests.zoo.case import CLASSES, SEQUENCE, VOCABULARY
from tests.zoo.hf import (
    DECODER,
    ENCODER,
    GPT,
    GROUPED,
    IMAGE_LEARNING_RATE,
    MIXTURE,
    NO_GPT_DROPOUT,
    SEQ2SEQ,
    SPECIAL,
    WIDTHS,
    LazyHFModule,
    Table,
    audio,
    hf_cases,
    image,
    masked_tokens,
    pair_of_texts,
    tokens,
)

CAUSAL: Table = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT | NO_GPT_DROPOUT),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 16}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 16}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | NO_GPT_DROPOUT | {"rotary_dim": 8}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        WIDTHS | {"ffn_dim": 128, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "dropout": 0.0},
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 4, "n_head": 4},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "falcon": ("FalconForCausalLM", "FalconConfig", WIDTHS),
    "falcon_new": (
        "FalconForCausalLM",
        "FalconConfig",
        WIDTHS | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        DECODER
        | MIXTURE
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        SPECIAL
        | {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "state_size": 8,
            "time_step_rank": 4,
            "time_step_min": 0.1,
            "time_step_max": 1.0,
        },
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        SPECIAL
        | {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 4,
            "expansion_ratio": 2,
            "max_seq_len": 64,
        },
    ),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", GROUPED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "cohere": ("CohereForCausalLM", "CohereConfig", GROUPED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED | {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
}

MASKED: Table = {
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 4, "n_heads": 4}
        | {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0},
    ),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", ENCODER | {"embedding_size": 32}),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", ENCODER | {"embedding_size": 32}),
}

SEQUENCE_TO_SEQUENCE: Table = {
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ | {"max_position_embeddings": 64}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 4, "num_heads": 4}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    ),
}

IMAGE: Table = {
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        | {"image_size": 16, "patch_size": 4, "num_labels": CLASSES},
    ),
}

SPEECH: Table = {
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ
        | {"num_mel_bins": 8, "max_source_positions": SEQUENCE, "max_target_positions": 32}
        | {"begin_suppress_tokens": None, "suppress_tokens": None},
    ),
}


LAZY = {name: CAUSAL[name] for name in ("llama", "gpt2")}

CASES = [
    *hf_cases(CAUSAL, tokens),
    *hf_cases(MASKED, masked_tokens),
    *hf_cases(SEQUENCE_TO_SEQUENCE, pair_of_texts),
    *hf_cases(IMAGE, image, learning_rate=IMAGE_LEARNING_RATE),
    *hf_cases(SPEECH, audio),
    *hf_cases(LAZY, tokens, module_class=LazyHFModule, suffix="_lazy"),
]
