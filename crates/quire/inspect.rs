//! `quire inspect`: what a checkpoint is and what memory it needs, from its headers alone.

use std::io::{self, Write};

use quire_core::QuantFormat;
use quire_model::{Checkpoint, Ffn, FfnShape, Head, Mixer, ModelSpec, QkNorm, TensorInfo};
use quire_runner::WeightPlan;

use crate::cli::InspectArgs;
use crate::config::{Config, Machine};
use crate::model::LocalModel;
use crate::units::{Bytes, grouped};
use crate::{Failure, Result};

/// Prints the report.
pub(crate) fn inspect(args: &InspectArgs, out: &mut impl Write) -> Result<()> {
    let checkpoint = LocalModel::from_args(&args.engine)?.open(args.engine.load_format)?;
    let spec = checkpoint.spec();
    let config = Config::resolve(&args.engine, spec, &Machine::detect());
    let mut print = || -> io::Result<()> {
        print_spec(out, spec)?;
        print_tensors(out, &checkpoint, args.all_tensors)?;
        match &config {
            Ok(config) => writeln!(out, "\n{config}\n         {} in all", Bytes(config.memory.total_bytes())),
            Err(error) => writeln!(out, "\nno memory plan: {error}"),
        }
    };
    print().map_err(Failure::output)
}

/// One line about a model, as `serve` prints it too.
pub(crate) fn headline(spec: &ModelSpec) -> String {
    let parameters = match spec.num_parameters() {
        count @ 0..10_000_000 => format!("{:.1} M", count as f64 / 1e6),
        count @ 10_000_000..1_000_000_000 => format!("{:.0} M", count as f64 / 1e6),
        count => format!("{:.2} B", count as f64 / 1e9),
    };
    format!("{}, {parameters} parameters in {}", spec.architecture, spec.dtype)
}

fn print_spec(out: &mut impl Write, spec: &ModelSpec) -> io::Result<()> {
    writeln!(out, "{}", headline(spec))?;
    let head = if spec.head == Head::Tied { "tied to the embedding" } else { "its own weights" };
    writeln!(out, "  layers        {}", spec.layers.len())?;
    writeln!(out, "  hidden size   {}", spec.hidden_size)?;
    writeln!(out, "  vocabulary    {}; output head {head}", grouped(spec.vocab_size as u64))?;
    writeln!(out, "  context       {} tokens", grouped(spec.max_model_len() as u64))?;
    let layer = &spec.layers[0];
    let Mixer::Gqa(gqa) = &layer.mixer;
    let mut extras = Vec::new();
    if gqa.qk_norm == QkNorm::PerHead {
        extras.push("QK-norm".to_owned());
    }
    if gqa.qkv_bias {
        extras.push("bias on QKV".to_owned());
    }
    if let Some(window) = gqa.window {
        extras.push(format!("sliding window {}", grouped(window.into())));
    }
    let extras = if extras.is_empty() { String::new() } else { format!("; {}", extras.join(", ")) };
    writeln!(
        out,
        "  attention     {} query and {} KV heads of {}{extras}",
        gqa.num_heads, gqa.num_kv_heads, gqa.head_dim
    )?;
    writeln!(out, "  rope          theta {}, scaling {:?}", gqa.rope.theta, gqa.rope.scaling)?;
    let mut kinds: Vec<(String, usize)> = Vec::new();
    for text in spec.layers.iter().map(|layer| feed_forward(&layer.ffn)) {
        match kinds.iter_mut().find(|(known, _)| *known == text) {
            Some((_, layers)) => *layers += 1,
            None => kinds.push((text, 1)),
        }
    }
    for (text, layers) in &kinds {
        let layers = if kinds.len() > 1 { format!(", in {layers} layers") } else { String::new() };
        writeln!(out, "  feed-forward  {text}{layers}")?;
    }
    writeln!(out, "  weights       {}", sizes(spec))?;
    writeln!(out, "  KV a token    {}", Bytes(spec.kv_bytes_per_token(spec.dtype)))?;
    writeln!(out, "  tokens        bos {:?}, eos {:?}", spec.bos_token_id, spec.eos_token_ids)
}

fn feed_forward(ffn: &Ffn) -> String {
    match ffn {
        Ffn::Dense(ffn) => {
            let shape = if ffn.shape == FfnShape::Gated { "gated " } else { "" };
            format!("{} wide, {shape}{:?}", ffn.intermediate_size, ffn.activation)
        }
        Ffn::Moe(moe) => format!(
            "{} of {} experts a token, each {} wide, gated {:?}",
            moe.num_experts_per_tok, moe.num_experts, moe.intermediate_size, moe.activation
        ),
    }
}

/// What the weights take as they are and in each format of `--quantize`: `1.1 GiB in bf16, 571.6 MiB in int8, …`.
fn sizes(spec: &ModelSpec) -> String {
    let formats = [QuantFormat::None, QuantFormat::Int8, QuantFormat::Int4];
    let size = |quant: QuantFormat| {
        let name = if quant == QuantFormat::None { spec.dtype.name() } else { quant.name() };
        format!("{} in {name}", Bytes(WeightPlan::new(spec, quant).bytes))
    };
    formats.map(size).join(", ")
}

/// The tensors; those of all layers and experts after the first are left out unless `all`, because they look alike.
fn print_tensors(out: &mut impl Write, checkpoint: &Checkpoint, all: bool) -> io::Result<()> {
    let tensors = checkpoint.tensors();
    let total: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
    writeln!(out, "\n{} tensors, {}", tensors.len(), Bytes(total))?;
    let shown: Vec<&TensorInfo> =
        tensors.iter().filter(|tensor| all || numbers(&tensor.name).all(|number| number == 0)).collect();
    let width = shown.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
    for tensor in &shown {
        let shape = format!("{:?}", tensor.shape);
        writeln!(
            out,
            "  {:width$}  {:4}  {shape:16}  {:>9}  {}",
            tensor.name,
            tensor.dtype,
            Bytes(tensor.bytes),
            tensor.file
        )?;
    }
    if shown.len() < tensors.len() {
        writeln!(
            out,
            "  … and {} more in the layers{} after the first (--all-tensors)",
            tensors.len() - shown.len(),
            if shown.iter().any(|tensor| numbers(&tensor.name).count() > 1) { " and experts" } else { "" }
        )?;
    }
    for name in checkpoint.ignored_tensors() {
        writeln!(out, "  not used by this architecture: {name}")?;
    }
    Ok(())
}

/// The numbers between dots in a tensor's name: its layer, and its expert.
fn numbers(name: &str) -> impl Iterator<Item = usize> {
    name.split('.').filter_map(|part| part.parse().ok())
}
