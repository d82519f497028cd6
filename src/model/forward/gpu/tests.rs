//! Compares the scoring pass with the pass over tensors, whose operations are compared with the CPU one by one. These
//! tests need a GPU.

use std::path::PathBuf;

use candle_core::{DType, Device, Result, Tensor};

use crate::config::{Config, DeviceChoice, DtypeChoice, ModelConfig, Quantize, Sources};
use crate::model::device::Placement;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::lora::Adapter;
use crate::model::forward::gemma::{Gemma, PackedRow, PrefixCache};
use crate::model::forward::linear::LoraMode;
use crate::model::forward::load::LoadOptions;
use crate::model::kernels::cuda::driver_calls::driver_calls;
use crate::test_files::test_file;

const FAMILIES: [&str; 4] = ["gemma", "gemma2", "gemma3", "gemma3_linear8"];
const ADAPTERS: [Option<&str>; 3] = [None, Some("lora_qv"), Some("lora_all_rslora")];

fn folder(family: &str) -> PathBuf {
    test_file("tests/fixtures").join(family)
}

fn placement(device: DeviceChoice, dtype: DtypeChoice) -> Placement {
    let model = ModelConfig {
        device,
        dtype,
        ..Config::load(&Sources::default()).unwrap().model
    };
    Placement::from_settings(&model).unwrap()
}

fn gpu() -> Placement {
    placement(DeviceChoice::Cuda(0), DtypeChoice::Bf16)
}

fn load(family: &str, adapter: Option<&str>, placement: Placement) -> Gemma {
    let folder = folder(family);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let adapter = adapter.map(|name| Adapter::load(&folder.join(name), checkpoint.config(), "").unwrap());
    let options = LoadOptions {
        lora: LoraMode::Merged,
        quantize: Quantize::None,
        placement,
        for_training: false,
    };
    Gemma::load(&checkpoint, adapter.as_ref(), options).unwrap()
}

/// Rows of different lengths, some of which share less than the whole prefix.
struct Rows {
    prefix: Vec<u32>,
    own: Vec<(Vec<u32>, usize)>,
}

impl Rows {
    fn new(count: usize) -> Self {
        let ids = |start: usize, count: usize| (start..start + count).map(|id| (2 + 7 * id % 200) as u32).collect();
        let own = |row: usize| (ids(31 * row, 1 + 13 * row % 40), if row % 5 == 3 { 11 } else { 20 });
        Self {
            prefix: ids(5, 20),
            own: (0..count).map(own).collect(),
        }
    }

    fn packed(&self) -> Vec<PackedRow<'_>> {
        self.own
            .iter()
            .map(|(own, shared)| PackedRow { own, shared: *shared })
            .collect()
    }

    /// Returns the hidden states in f32 on the CPU: (rows, hidden).
    fn hidden(&self, gemma: &Gemma) -> Result<Tensor> {
        let prefix: PrefixCache = gemma.cache_prefix(&self.prefix)?;
        let hidden = gemma.forward(&self.packed(), Some(&prefix))?;
        hidden.to_device(&Device::Cpu)?.to_dtype(DType::F32)
    }
}

/// Returns the root of the mean square of the differences.
fn difference(one: &Tensor, other: &Tensor) -> Result<f32> {
    (one - other)?.sqr()?.mean_all()?.sqrt()?.to_scalar()
}

/// Both passes round to bf16 at different points. So the scoring pass may be further from the exact result than the
/// pass over tensors, but not by much.
#[test]
fn the_scoring_pass_equals_the_pass_over_tensors() -> Result<()> {
    let rows = Rows::new(30);
    for family in FAMILIES {
        for adapter in ADAPTERS {
            let exact = rows.hidden(&load(family, adapter, Placement::cpu()))?;
            let gemma = load(family, adapter, gpu());
            assert!(gemma.gpu.is_some(), "{family}: the kernels support its sizes");
            let over_tensors = Gemma {
                gpu: None,
                ..gemma.clone()
            };
            let (found, plain) = (rows.hidden(&gemma)?, rows.hidden(&over_tensors)?);
            let (error, usual) = (difference(&found, &exact)?, difference(&plain, &exact)?);
            println!("{family} {adapter:?}: error {error:.2e}, over tensors {usual:.2e}");
            assert!(
                error <= 1.5 * usual,
                "{family} {adapter:?}: {error}, over tensors {usual}"
            );
        }
    }
    Ok(())
}

/// An adapter that is put beside a loaded base gives the same as one that is loaded with it, bit for bit, and leaves the
/// base as it was.
#[test]
fn adapters_share_one_base() -> Result<()> {
    let rows = Rows::new(9);
    let base = load("gemma3", None, gpu());
    let before = rows.hidden(&base)?.to_vec2::<f32>()?;
    for name in ["lora_qv", "lora_all_rslora"] {
        let adapter = Adapter::load(&folder("gemma3").join(name), base.config(), "").unwrap();
        let beside = rows.hidden(&base.with_adapter(&adapter)?)?.to_vec2::<f32>()?;
        assert_eq!(
            beside,
            rows.hidden(&load("gemma3", Some(name), gpu()))?.to_vec2::<f32>()?
        );
        assert_ne!(beside, before);
    }
    assert_eq!(rows.hidden(&base)?.to_vec2::<f32>()?, before);
    Ok(())
}

/// What a row gives does not depend on the size of the buffers, or on what earlier passes left in them.
#[test]
fn buffers_grow_shrink_and_are_used_again() -> Result<()> {
    let gemma = load("gemma2", Some("lora_all_rslora"), gpu());
    let (few, many) = (Rows::new(3), Rows::new(60));
    let expected = few.hidden(&gemma)?.to_vec2::<f32>()?;
    let bytes = gemma.buffer_bytes();
    many.hidden(&gemma)?;
    assert!(gemma.buffer_bytes() > bytes);
    assert_eq!(few.hidden(&gemma)?.to_vec2::<f32>()?, expected);
    gemma.limit_buffers(100);
    assert_eq!(gemma.buffer_bytes(), 0);
    assert_eq!(few.hidden(&gemma)?.to_vec2::<f32>()?, expected);
    assert_eq!(gemma.buffer_bytes(), bytes);
    Ok(())
}

/// A small pass is queued kernel by kernel when its size comes first, captured as a graph when it comes again, and then
/// repeated. All give the same, bit for bit, for other rows of that size too, and after the buffers have moved.
#[test]
fn graphs_equal_the_passes_that_they_repeat() -> Result<()> {
    for (family, adapter) in [("gemma2", None), ("gemma3", Some("lora_all_rslora"))] {
        let gemma = load(family, adapter, gpu());
        let mut kernel_by_kernel = gemma.clone();
        let gpu = kernel_by_kernel.gpu.as_mut().unwrap();
        gpu.without_graphs();
        let (few, many) = (Rows::new(12), Rows::new(60));
        let prefix = gemma.cache_prefix(&few.prefix)?;
        let hidden = |gemma: &Gemma, rows: &Rows| -> Result<Vec<Vec<f32>>> {
            let hidden = gemma.forward(&rows.packed(), Some(&prefix))?;
            hidden.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2()
        };
        let mut others = Rows::new(12);
        others.own.reverse();
        let passes = [&few, &few, &few, &others, &many, &few, &many, &few, &many, &others];
        for (pass, rows) in passes.into_iter().enumerate() {
            let found = hidden(&gemma, rows)?;
            let expected = hidden(&kernel_by_kernel, rows)?;
            assert!(found == expected, "{family} {adapter:?} pass {pass}");
        }
        assert!(gemma.gpu.as_ref().unwrap().graph_count() > 0, "no graph was captured");
    }
    Ok(())
}

/// A pass costs the host few calls: nine in a layer, none of which allocates, and up to five more with an adapter. The
/// allowance is for what a pass does once: its inputs, the embedding, the last layer's separate queries, and its result.
/// As a graph, it costs no call for a layer.
#[test]
#[ignore = "only the emulated driver counts its calls; tests/gpu/emulated/checks runs this test"]
fn driver_calls_of_a_pass_are_few() -> Result<()> {
    const ALLOWANCE: u64 = 12;
    let rows = Rows::new(9);
    for (adapter, calls_in_a_layer) in [(None, 9), (Some("lora_all_rslora"), 14)] {
        let gemma = load("gemma3", adapter, gpu());
        let prefix = gemma.cache_prefix(&rows.prefix)?;
        let calls = |gemma: &Gemma| -> Result<u64> {
            let before = driver_calls();
            gemma.forward(&rows.packed(), Some(&prefix))?;
            Ok(driver_calls() - before)
        };
        // The first pass allocates the buffers, and the second one captures the graph.
        calls(&gemma)?;
        calls(&gemma)?;
        let found = calls(&gemma)?;
        assert!(found <= ALLOWANCE, "{adapter:?}: {found} calls for a graph");
        let mut kernel_by_kernel = gemma.clone();
        kernel_by_kernel.gpu.as_mut().unwrap().without_graphs();
        let found = calls(&kernel_by_kernel)?;
        let allowed = calls_in_a_layer * gemma.config().num_layers() as u64 + ALLOWANCE;
        assert!(
            found <= allowed,
            "{adapter:?}: {found} calls, expected at most {allowed}"
        );
    }
    Ok(())
}
