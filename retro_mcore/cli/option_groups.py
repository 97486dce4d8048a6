"""Groups of options in `--help`."""

from __future__ import annotations

from fnmatch import fnmatchcase

#: Patterns of option names by group, in the order shown. The first match counts. Options of one
#: name mean the same in all commands.
GROUPS: dict[str, str] = {
    "data": "project_dir input input_weights json_keys id_key clean_text near_duplicate* "
    "append exchange remove remove_file compact "
    "data_path data_folder valid_data_path sample_input_file seq_length retro_chunk_length "
    "train_* micro_batch_size global_batch_size rampup_batch_size eval_interval eval_iters "
    "eval_documents num_workers seed split samples num_samples retro_block_size "
    "retro_doc_block_size verify reset_position_ids reset_attention_mask eod_mask_loss",
    "tokenizer": "tokenizer_* vocab_file merge_file eod_token bos_token add_bos* vocab_size "
    "bert_vocab_file",
    "prompt": "prompt prompt_* task template_id passages longform_answer ft_neighbours reuse_top "
    "loss_on pack_* two_chunks num_gen",
    "model": "num_layers hidden_size num_attention_heads group_query_attention num_query_groups "
    "ffn_hidden_size kv_channels norm* apply_layernorm_1p swiglu geglu openai_gelu "
    "squared_relu num_experts moe_layer_freq moe_ffn_* moe_shared_* moe_router_* moe_*_coeff "
    "sublayer_norms parallel_residual *_multiplier logits_scaling softmax_scale "
    "*_softcap no_rope_layers "
    "position_embedding_type rotary_* *rope_scaling* max_position_embeddings "
    "untie_embeddings_and_output_weights disable_bias_linear add_qkv_bias qk_layernorm* "
    "sliding_window window_attn_skip_freq hidden_dropout attention_dropout *init_method* "
    "make_vocab_size_divisible_by retro_origin retro_deepnorm retro_mup_*",
    "retrieval": "retro_neighbors retro_attention_gate no_retrieval embedder* embed_* embeddings_* "
    "index* "
    "nprobe ef_search on_disk split_index faiss_gpu rerank rescore num_neighbors* "
    "num_retrieved_chunks neighbors show_neighbors retrieval_* retro_index_* retro_num_* "
    "retro_encoder_* retro_cross_attention_* retro_matching_start retro_decoder_layers "
    "retro_drop_* retro_replace_*",
    "generation": "max_new_tokens min_new_tokens stop* temperature top_* logprobs",
    "evaluation": "protocol retro_eval_neighbors overlapping_eval leakage* predictions bootstrap "
    "attribute database_fraction ablate_retrieval legacy_scoring confidence_level num_resamples "
    "histogram_chunks shortest_shared_run",
    "optimizer": "optimizer lr lr_* min_lr *weight_decay* adam_* sgd_* muon_* adaptive_muon_* "
    "lion_* soap_* "
    "optimizer_* clip_grad decoupled_* use_precision_aware_optimizer freeze_decoder",
    "precision": "fp8_* fp4_* bf16 fp16 *_bf16 tp_only_amax_red fp32_residual_connection "
    "*loss_scale* hysteresis accumulate_allreduce_grads_in_fp32",
    "parallelism": "device tensor_model_* sequence_parallel *pipeline* context_parallel_size "
    "expert_*parallel_size moe_* *_timeout_minutes "
    "cp_comm_type *overlap* world_size use_distributed_optimizer ddp_*",
    "computation": "transformer_impl attention_backend no_*_fusion no_persist_layer_norm "
    "cross_entropy_* *offloading* offload_modules recompute_* "
    "use_cpu_initialization deterministic_mode",
    "checkpoint": "save save_* async_save keep_last_n load load_* ckpt_step use_checkpoint_args "
    "finetune *_opt_param_scheduler no_load_* exit_* target target_* decoder_only max_shard_size "
    "model_config non_persistent_* replication*",
    "logging": "log_* tensorboard_* wandb_* check_for_* device_peak_tflops",
    "scale": "tokens training_tokens document_tokens embedding_dimension hours *_per_node "
    "node_memory *_rate measure",
    "server": "host port api_key_file model_name chat_template max_* *_seconds",
    "run": "dry_run simulate skip_train stage shard time_limit output html json",
}


def group_of(name: str) -> str | None:
    """The group of an option; None if it has none."""
    for group, patterns in GROUPS.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return group
    return None
