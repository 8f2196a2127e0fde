//! Whether the tensors in the files are those that the config describes.

use std::collections::BTreeSet;

use crate::checkpoint::dtype;
use crate::error::{ModelError, Result};
use crate::spec::{Head, ModelSpec};
use crate::store::Store;
use crate::weights::{GlobalTensor, WeightNames};

/// How many names an error lists.
const MAX_LISTED: usize = 6;

/// Checks presence, shape and dtype of every tensor. Returns the names of tensors that are not used and may be ignored.
pub(crate) fn check(spec: &ModelSpec, names: &WeightNames, store: &Store) -> Result<Vec<String>> {
    let mut expected = BTreeSet::new();
    let mut missing = Vec::new();
    let mut check_one = |name: String, shape: &[usize]| -> Result<()> {
        match store.get(&name) {
            None => missing.push(name.clone()),
            Some(stored) if stored.shape != shape => {
                return Err(ModelError::Mismatch(format!(
                    "{}: tensor `{name}` has shape {:?}, but config.json asks for {shape:?}",
                    stored.file, stored.shape
                )));
            }
            Some(stored) => {
                dtype(&stored)?;
            }
        }
        expected.insert(name);
        Ok(())
    };

    let head_name = (names.global)(GlobalTensor::LmHead);
    for (tensor, shape) in spec.global_tensors() {
        let name = (names.global)(tensor);
        let only_as_head =
            tensor == GlobalTensor::Embed && spec.head == Head::Tied && store.get(name).is_none();
        check_one(if only_as_head { head_name } else { name }.to_owned(), &shape)?;
    }
    for layer in 0..spec.layers.len() {
        for (tensor, shape) in spec.layer_tensors(layer) {
            check_one(names.layer_name(layer, tensor), &shape)?;
        }
    }
    if !missing.is_empty() {
        return Err(ModelError::Mismatch(format!("the checkpoint lacks {}", list(&missing))));
    }
    unused(spec, names, store, &expected)
}

/// Leftovers outside the layers are harmless. A tensor inside a layer that the spec does not know (a bias, a norm, a
/// quantization scale) would change the numbers, so the config and the weights are not of one model.
fn unused(
    spec: &ModelSpec,
    names: &WeightNames,
    store: &Store,
    expected: &BTreeSet<String>,
) -> Result<Vec<String>> {
    let unused = store.iter().map(|stored| stored.name.to_owned()).filter(|name| !expected.contains(name));
    // Rotary tables that old exporters stored: they are computed here.
    let unused: Vec<_> = unused.filter(|name| !name.contains(".rotary_emb.")).collect();
    let in_a_layer = |name: &&String| names.layer_of(name).is_some_and(|layer| layer < spec.layers.len());
    let unexplained: Vec<_> = unused.iter().filter(in_a_layer).cloned().collect();
    if !unexplained.is_empty() {
        return Err(ModelError::Mismatch(format!(
            "config.json ({}) does not account for {}",
            spec.architecture,
            list(&unexplained)
        )));
    }
    Ok(unused)
}

fn list(names: &[String]) -> String {
    let shown: Vec<_> = names.iter().take(MAX_LISTED).map(|name| format!("`{name}`")).collect();
    let rest = names.len() - shown.len();
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    let noun = if names.len() == 1 { "tensor" } else { "tensors" };
    format!("{noun} {}{more}", shown.join(", "))
}
