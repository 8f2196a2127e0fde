//! The argument structs of the kernels, as `kernels/include/*params.h` defines them: field by field, in order. A test
//! compiles the headers and compares sizes and offsets.
//!
//! Addresses are `u64`, null where a header allows it. What each field means is said there.

/// Declares mirrors, with the offsets of their fields for the test.
macro_rules! params {
    ($($(#[$doc:meta])* $name:ident = $c_name:literal { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default)]
            pub struct $name {
                $(#[allow(missing_docs, reason = "documented in the header")] pub $field: $type,)*
            }
        )*

        /// `(C name, size, fields with their offsets)` of every mirror.
        pub fn layouts() -> Vec<(&'static str, usize, Vec<(&'static str, usize)>)> {
            vec![$((
                $c_name,
                size_of::<$name>(),
                vec![$((stringify!($field), std::mem::offset_of!($name, $field))),*],
            )),*]
        }
    };
}

params! {
    /// `quire_embed_*`.
    EmbedParams = "QuireEmbedParams" {
        table: u64,
        token_ids: u64,
        last_tokens: u64,
        out: u64,
        num_rows: u64,
        hidden: i32,
        vocab: i32,
        scale: f32,
        reserved: i32,
    }
    /// `quire_add_norm_*`, `quire_post_norm_*`.
    AddNormParams = "QuireAddNormParams" {
        residual: u64,
        delta: u64,
        delta_weight: u64,
        weight: u64,
        out: u64,
        num_rows: u64,
        hidden: i32,
        eps: f32,
    }
    /// `quire_rope_cache_*`.
    RopeCacheParams = "QuireRopeCacheParams" {
        qkv: u64,
        bias: u64,
        q_norm: u64,
        k_norm: u64,
        rope: u64,
        positions: u64,
        slot_mapping: u64,
        kv: u64,
        kv_scales: u64,
        num_rows: u64,
        num_heads: i32,
        num_kv_heads: i32,
        head_dim: i32,
        rotary_dim: i32,
        page_tokens: i32,
        eps: f32,
        write_back: i32,
        reserved: i32,
    }
    /// `quire_act_*`.
    ActParams = "QuireActParams" {
        r#in: u64,
        out: u64,
        num_rows: u64,
        width: i32,
        kind: i32,
        gated: i32,
        reserved: i32,
    }
    /// `quire_soft_cap`.
    SoftCapParams = "QuireSoftCapParams" {
        x: u64,
        num_rows: u64,
        cols: i32,
        stride: i32,
        cap: f32,
        reserved: i32,
    }
    /// `quire_gather_rows_*`.
    GatherRowsParams = "QuireGatherRowsParams" {
        r#in: u64,
        rows: u64,
        out: u64,
        num_rows: u64,
        row_stride: i32,
        hidden: i32,
    }
    /// `quire_copy_pages`.
    CopyPagesParams = "QuireCopyPagesParams" {
        pairs: u64,
        num_pairs: u64,
        src: u64,
        dst: u64,
        page_bytes: u64,
        src_layer_stride: u64,
        dst_layer_stride: u64,
        num_layers: i32,
        reserved: i32,
    }
    /// `quire_step_plan`.
    StepPlanParams = "QuireStepPlanParams" {
        cu_seqlens_q: u64,
        seq_lens: u64,
        seq_slots: u64,
        num_seqs: u64,
        block_tables: u64,
        positions: u64,
        slot_mapping: u64,
        num_rows: u64,
        table_stride: i32,
        page_tokens: i32,
        bucket: i32,
        reserved: i32,
    }
    /// `quire_update_tables`.
    UpdateTablesParams = "QuireUpdateTablesParams" {
        entries: u64,
        num_entries: u64,
        block_tables: u64,
        table_stride: i32,
        reserved: i32,
    }
    /// A row of logits of a step.
    LogitRowEntry = "QuireLogitRow" {
        row: i32,
        slot: i32,
        position: u32,
        target: i32,
        num_logprobs: i32,
        reserved: i32,
    }
    /// How a slot samples.
    SlotSampling = "QuireSlotSampling" {
        seed: u64,
        temperature: f32,
        top_p: f32,
        min_p: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        repetition_penalty: f32,
        top_k: u32,
        prompt_len: u32,
        min_tokens: u32,
        counts: i32,
        bias_begin: i32,
        bias_count: i32,
        stop_begin: i32,
        stop_count: i32,
    }
    /// `quire_logits_process`.
    LogitsParams = "QuireLogitsParams" {
        logits: u64,
        adjusted: u64,
        rows: u64,
        num_rows: u64,
        slots: u64,
        counts: u64,
        masks: u64,
        mask_rows: u64,
        bias_ids: u64,
        bias_values: u64,
        stop_ids: u64,
        best: u64,
        vocab: i32,
        stride: i32,
        mask_words: i32,
        reserved: i32,
    }
    /// `quire_sample`.
    SampleParams = "QuireSampleParams" {
        logits: u64,
        adjusted: u64,
        rows: u64,
        num_rows: u64,
        slots: u64,
        masks: u64,
        mask_rows: u64,
        best: u64,
        sampled: u64,
        last_tokens: u64,
        counts: u64,
        vocab: i32,
        stride: i32,
        mask_words: i32,
        splits: i32,
    }
    /// `quire_logprobs`.
    LogprobsParams = "QuireLogprobsParams" {
        logits: u64,
        rows: u64,
        num_rows: u64,
        best: u64,
        sampled: u64,
        logprob: u64,
        rank: u64,
        top_ids: u64,
        top_logprobs: u64,
        max_top: i32,
        vocab: i32,
        stride: i32,
        splits: i32,
    }
    /// `quire_count_tokens`.
    CountTokensParams = "QuireCountTokensParams" {
        counts: u64,
        tokens: u64,
        num_tokens: i32,
        num_prompt: i32,
        vocab: i32,
        reserved: i32,
    }
    /// Part of a sequence's rows over part of its keys: what `quire_attention_plan` writes.
    AttentionItem = "QuireAttentionItem" {
        seq: i32,
        q_start: i32,
        first_position: i32,
        row_begin: i32,
        num_rows: i32,
        kv_begin: i32,
        kv_end: i32,
        num_splits: i32,
        split_offset: i32,
        partial: i32,
        counter: i32,
        num_items: i32,
        reserved: [i32; 4],
    }
    /// What an adapter adds to some outputs of a layer.
    LoraPartEntry = "QuireLoraPart" {
        b: u64,
        first: i32,
        count: i32,
        rank_begin: i32,
        rank: i32,
        scaling: f32,
        reserved: i32,
    }
    /// An adapter of one layer.
    LoraAdapterEntry = "QuireLoraAdapter" {
        a: u64,
        rank: i32,
        num_parts: i32,
        parts: [LoraPartEntry; 3],
    }
    /// `quire_lora_shrink_*`.
    LoraShrinkParams = "QuireLoraShrinkParams" {
        x: u64,
        adapters: u64,
        row_adapters: u64,
        out: u64,
        num_rows: u64,
        in_features: i32,
        stride: i32,
    }
    /// `quire_lora_expand_*`.
    LoraExpandParams = "QuireLoraExpandParams" {
        x: u64,
        adapters: u64,
        row_adapters: u64,
        out: u64,
        num_rows: u64,
        out_features: i32,
        stride: i32,
    }
    /// `quire_quantize_fp8_*`.
    Fp8QuantizeParams = "QuireFp8QuantizeParams" {
        x: u64,
        q: u64,
        scales: u64,
        num_rows: u64,
        in_features: i32,
        x_stride: i32,
        q_stride: i32,
        reserved: i32,
    }
    /// `quire_embed_fp8`.
    Fp8EmbedParams = "QuireFp8EmbedParams" {
        weight: u64,
        w_scales: u64,
        token_ids: u64,
        last_tokens: u64,
        out: u64,
        num_rows: u64,
        hidden: i32,
        stride: i32,
        vocab: i32,
        scale: f32,
    }
    /// `quire_attention_{decode,prefill}_*`.
    AttentionParams = "QuireAttentionParams" {
        q: u64,
        kv: u64,
        kv_scales: u64,
        out: u64,
        block_tables: u64,
        items: u64,
        num_items: u64,
        partial_out: u64,
        partial_max_sum: u64,
        counters: u64,
        carry: u64,
        sinks: u64,
        scale: f32,
        soft_cap: f32,
        window: i32,
        num_kv_heads: i32,
        group: i32,
        head_dim: i32,
        page_shift: i32,
        block_table_stride: i32,
        q_stride: i32,
        out_stride: i32,
    }
    /// `quire_attention_prefill_sm90a_*`.
    AttentionSm90aParams = "QuireAttentionSm90aParams" {
        pages: [u64; 16],
        attention: AttentionParams,
        num_rows: i32,
        reserved: [i32; 13],
    }
    /// Slots of one expert.
    MoeTile = "QuireMoeTile" {
        expert: i32,
        first: i32,
        count: i32,
        reserved: i32,
    }
    /// `quire_moe_route`.
    MoeRouteParams = "QuireMoeRouteParams" {
        logits: u64,
        experts: u64,
        weights: u64,
        num_rows: u64,
        num_experts: i32,
        stride: i32,
        top_k: i32,
        renormalise: i32,
    }
    /// `quire_moe_sort`.
    MoeSortParams = "QuireMoeSortParams" {
        experts: u64,
        num_rows: u64,
        slots: u64,
        tiles: u64,
        num_tiles: u64,
        num_experts: i32,
        top_k: i32,
    }
    /// `quire_moe_{gate_up,down}_*` and `quire_moe_{gate_up,down}_fp8_*`.
    MoeGemmParams = "QuireMoeGemmParams" {
        x: u64,
        weight: u64,
        w_scales: u64,
        out: u64,
        slots: u64,
        tiles: u64,
        num_tiles: u64,
        in_features: i32,
        out_features: i32,
        top_k: i32,
        kind: i32,
    }
    /// `quire_moe_{gate_up,down}_int{8,4}_*`.
    MoeIntParams = "QuireMoeIntParams" {
        q: u64,
        x_scales: u64,
        weight: u64,
        steps: u64,
        w_scales: u64,
        out: u64,
        slots: u64,
        tiles: u64,
        num_tiles: u64,
        groups: i32,
        out_features: i32,
        top_k: i32,
        kind: i32,
    }
    /// `quire_moe_combine_*`.
    MoeCombineParams = "QuireMoeCombineParams" {
        y: u64,
        weights: u64,
        out: u64,
        num_rows: u64,
        hidden: i32,
        top_k: i32,
    }
    /// `quire_attention_plan`.
    AttentionPlanParams = "QuireAttentionPlanParams" {
        cu_seqlens_q: u64,
        seq_lens: u64,
        seq_slots: u64,
        num_seqs: u64,
        decode_items: u64,
        num_decode_items: u64,
        prefill_items: u64,
        num_prefill_items: u64,
        num_kv_heads: i32,
        group: i32,
        window: i32,
        prefill_rows: i32,
        decode_blocks: i32,
        prefill_blocks: i32,
        max_items: i32,
        max_partials: i32,
        max_counters: i32,
        reserved: i32,
    }
    /// `quire_gemv_*`.
    GemvParams = "QuireGemvParams" {
        x: u64,
        weight: u64,
        bias: u64,
        out: u64,
        num_rows: u64,
        in_features: i32,
        out_features: i32,
        x_stride: i32,
        out_stride: i32,
    }
    /// `quire_quantize_*`.
    QuantizeParams = "QuireQuantizeParams" {
        x: u64,
        q: u64,
        scales: u64,
        num_rows: u64,
        in_features: i32,
        groups: i32,
        x_stride: i32,
        rows_per_count: i32,
    }
    /// `quire_int{8,4}_gemm_*`.
    IntGemmParams = "QuireIntGemmParams" {
        q: u64,
        x_scales: u64,
        weight: u64,
        steps: u64,
        w_scales: u64,
        bias: u64,
        out: u64,
        num_rows: u64,
        groups: i32,
        out_features: i32,
        out_stride: i32,
        reserved: i32,
    }
    /// `quire_embed_int{8,4}`.
    IntEmbedParams = "QuireIntEmbedParams" {
        weight: u64,
        steps: u64,
        w_scales: u64,
        token_ids: u64,
        last_tokens: u64,
        out: u64,
        num_rows: u64,
        hidden: i32,
        groups: i32,
        vocab: i32,
        scale: f32,
    }
}
