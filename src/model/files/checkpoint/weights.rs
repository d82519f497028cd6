//! The weight files of a checkpoint: one, or shards with an index that must agree with them.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::Deserialize;

use super::{MAX_JSON_BYTES, read_text};
use crate::fault::{Fault, Faults};
use crate::model::files::tensor_file::TensorFile;

/// The file that maps tensor names to shards.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// The weight files, and for each tensor name the index of its file.
pub(super) type WeightFiles = (Vec<TensorFile>, BTreeMap<String, usize>);

pub(super) fn open_weights(folder: &Path) -> Result<WeightFiles, Faults> {
    let index_path = folder.join("model.safetensors.index.json");
    let single_path = folder.join("model.safetensors");
    if !index_path.exists() {
        return Ok(single_file(TensorFile::open(&single_path)?));
    }
    let text = read_text(&index_path, MAX_JSON_BYTES)?;
    let shards: ShardIndex = serde_json::from_str(&text)
        .map_err(|error| Fault::file(&index_path, format!("cannot read the shard index: {error}")))?;
    let mut names: Vec<&String> = shards.weight_map.values().collect();
    names.sort_unstable();
    names.dedup();
    let mut faults = Faults::default();
    // transformers reads the single file, which the index may have replaced or be replaced by.
    if single_path.exists() && names.iter().all(|name| *name != "model.safetensors") {
        let text = "exists beside model.safetensors, which it does not name: remove the one that is out of date";
        faults.push(Fault::file(&index_path, text));
    }
    let mut files = Vec::new();
    for name in &names {
        // A shard must be a file of this folder, so that an index cannot make us read other files.
        let mut parts = Path::new(name.as_str()).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            faults.push(Fault::file(
                &index_path,
                format!("names the shard `{name}`, expected a plain file name"),
            ));
            continue;
        }
        files.extend(faults.collect(TensorFile::open(&folder.join(name.as_str()))));
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut index = BTreeMap::new();
    for (tensor, shard) in &shards.weight_map {
        // `names` is sorted, and `files` has one file for each name.
        let file = names.binary_search(&shard).unwrap_or_default();
        if files[file].shape(tensor).is_none() {
            faults.push(Fault::file(
                &index_path,
                format!("lists tensor `{tensor}` for `{shard}`, which does not contain it"),
            ));
        }
        index.insert(tensor.clone(), file);
    }
    for (number, file) in files.iter().enumerate() {
        // transformers reads every tensor of every shard.
        if let Some(name) = file
            .names()
            .into_iter()
            .filter(|name| index.get(name) != Some(&number))
            .min()
        {
            let text = format!("holds tensor `{name}`, which model.safetensors.index.json does not list for this file");
            faults.push(Fault::file(file.path(), text));
        }
    }
    if faults.is_empty() {
        Ok((files, index))
    } else {
        Err(faults)
    }
}

pub(super) fn single_file(file: TensorFile) -> WeightFiles {
    let index = file.names().into_iter().map(|name| (name, 0)).collect();
    (vec![file], index)
}
