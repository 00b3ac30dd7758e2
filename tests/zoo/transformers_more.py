"""More transformers architectures, for the full report only: what the mechanism was not developed on."""

from __future__ import annotations

from tests.zoo.case import CLASSES, VOCABULARY
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
    Table,
    hf_cases,
    image,
    masked_tokens,
    pair_of_texts,
    tokens,
)

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = MIXTURE | {"num_experts": 4}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}

CAUSAL: Table = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", GROUPED | SLIDING),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", GROUPED | {"head_dim": 16}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", GROUPED),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", GROUPED | EXPERTS | {"head_dim": 16}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        GROUPED | SLIDING | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        DECODER
        | MIXTURE
        | {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16}
        | {"q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        GROUPED | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", GROUPED | {"head_dim": 16}),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", DECODER),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", GROUPED),
    "helium": ("HeliumForCausalLM", "HeliumConfig", GROUPED | {"head_dim": 16}),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", GROUPED | SLIDING),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", GROUPED | {"head_dim": 16}),
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", GROUPED | {"head_dim": 16}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT | NO_GPT_DROPOUT),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", GPT | NO_GPT_DROPOUT | {"rotary_dim": 8}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        SPECIAL
        | {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "window_size": 8}
        | {"attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64},
    ),
    "xglm": (
        "XGLMForCausalLM",
        "XGLMConfig",
        SPECIAL
        | NO_DROPOUT
        | {"vocab_size": VOCABULARY, "d_model": 64, "ffn_dim": 128, "num_layers": 4, "attention_heads": 4},
    ),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", ENCODER),
    "falcon_alibi": ("FalconForCausalLM", "FalconConfig", WIDTHS | {"alibi": True, "multi_query": False}),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        SPECIAL
        | {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}
        | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8, "time_step_min": 0.1, "time_step_max": 1.0},
    ),
    "falcon_mamba": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
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
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        GROUPED
        | EXPERTS
        | {"head_dim": 16, "shared_expert_intermediate_size": 48, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"layer_types": ["linear_attention", "full_attention"] * 2, "initializer_range": 0.02},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        GROUPED
        | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
}

MASKED: Table = {
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "xlm_roberta": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", ENCODER),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", ENCODER),
    "megatron_bert": ("MegatronBertForMaskedLM", "MegatronBertConfig", ENCODER),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        DECODER | {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "convbert": ("ConvBertForMaskedLM", "ConvBertConfig", ENCODER | {"embedding_size": 64, "conv_kernel_size": 3}),
    "squeezebert": ("SqueezeBertForMaskedLM", "SqueezeBertConfig", ENCODER | {"embedding_size": 64}),
    "fnet": (
        "FNetForMaskedLM",
        "FNetConfig",
        SPECIAL
        | {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128}
        | {"hidden_dropout_prob": 0.0, "max_position_embeddings": 64},
    ),
}

SEQUENCE_TO_SEQUENCE: Table = {
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ | {"max_position_embeddings": 64}),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ | {"max_position_embeddings": 64}),
    "marian": ("MarianMTModel", "MarianConfig", SEQ2SEQ | {"max_position_embeddings": 64}),
    "umt5": (
        "UMT5ForConditionalGeneration",
        "UMT5Config",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 4, "num_heads": 4}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    ),
}

VISION = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
PATCHES = {"image_size": 16, "patch_size": 4, "num_labels": CLASSES}
IMAGE: Table = {
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION | PATCHES),
    "beit": ("BeitForImageClassification", "BeitConfig", VISION | PATCHES | {"drop_path_rate": 0.0}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", VISION | PATCHES),
    "siglip": (
        "SiglipForImageClassification",
        "SiglipConfig",
        {"vision_config": VISION | PATCHES, "num_labels": CLASSES},
    ),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": VISION | PATCHES, "num_labels": CLASSES}),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2}
        | {"drop_path_rate": 0.0, "num_labels": CLASSES},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"patch_size": 2, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "num_labels": CLASSES}
        | {"layer_scale_init_value": 0.1},
    ),
}

BATCH_STATISTICS: Table = {
    "hf_resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        | {"num_labels": CLASSES},
    ),
}

CASES = [
    *hf_cases(CAUSAL, tokens, slow=True),
    *hf_cases(MASKED, masked_tokens, slow=True),
    *hf_cases(SEQUENCE_TO_SEQUENCE, pair_of_texts, slow=True),
    *hf_cases(IMAGE, image, slow=True, learning_rate=IMAGE_LEARNING_RATE),
    *hf_cases(BATCH_STATISTICS, image, slow=True, microbatches="auto", learning_rate=IMAGE_LEARNING_RATE),
]
