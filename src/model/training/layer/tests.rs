//! Compares a layer in training with the serving pass, and its gradients with those of plain operations.

use candle_core::{Device, Result, Tensor, Var};

use super::{CpuOps, GradientBuffers, LayerGradients, LayerOps, LayerSizes, RowLayout, SavedLayer, TrainingLayer};
use crate::config::{Projection, Quantize};
use crate::model::device::Placement;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::lora::{Adapter, LoraWeights};
use crate::model::forward::gemma::Gemma;
use crate::model::forward::linear::LoraMode;
use crate::model::forward::load::LoadOptions;
use crate::model::forward::packing::{OutputPositions, PackedRow, PackedRows, SharedPrefix};
use crate::model::kernels::tests::random;
use crate::model::training::plain::PlainRows;

const FAMILIES: [&str; 4] = ["gemma", "gemma2", "gemma3", "gemma3_linear8"];
const PREFIX: usize = 20;

/// A model with an adapter on all projections, whose tensors are variables.
struct Case {
    model: Gemma,
    variables: Vec<(Projection, [Var; 2])>,
}

impl Case {
    fn new(family: &str) -> Self {
        let folder = crate::test_files::test_file("tests/fixtures").join(family);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let adapter = Adapter::load(&folder.join("lora_all_rslora"), checkpoint.config(), "").unwrap();
        let options = LoadOptions {
            lora: LoraMode::Unmerged,
            quantize: Quantize::None,
            placement: Placement::cpu(),
            for_training: true,
        };
        let mut model = Gemma::load(&checkpoint, None, options).unwrap();
        let mut variables = Vec::new();
        for (index, layer) in model.layers.iter_mut().enumerate() {
            for projection in Projection::ALL {
                let lora = adapter.get(index, projection).unwrap();
                let [a, b] = [&lora.a, &lora.b].map(|x| Var::from_tensor(x).unwrap());
                layer.projection_mut(projection).attach(LoraWeights {
                    a: a.as_tensor().clone(),
                    b: b.as_tensor().clone(),
                    scale: lora.scale,
                });
                variables.push((projection, [a, b]));
            }
        }
        Self { model, variables }
    }

    /// Returns the variables of a layer.
    fn variables_of(&self, layer: usize) -> &[(Projection, [Var; 2])] {
        let count = Projection::ALL.len();
        &self.variables[layer * count..][..count]
    }
}

/// Calls `check` with the layers and the residual streams of a serving pass over three rows, the first of which is the
/// prefix. The last item of the list is the output of the last layer.
fn with_pass(outputs: OutputPositions, mut check: impl FnMut(&str, &Case, &[Tensor], &[PackedRow<'_>]) -> Result<()>) {
    for family in FAMILIES {
        let case = Case::new(family);
        let tokens: Vec<u32> = (0..70).map(|index| 100 + 11 * index).collect();
        let row = |own, shared| PackedRow { own, shared };
        let rows = [
            row(&tokens[..PREFIX], 0),
            row(&tokens[PREFIX..50], 20),
            row(&tokens[50..], 13),
        ];
        let mut streams = Vec::new();
        let observe = &mut |input: &Tensor, _: &Tensor, _: &Tensor| streams.push(input.detach());
        let output = case.model.run(&rows, SharedPrefix::FirstRow, outputs, observe).unwrap();
        streams.push(output.residual.detach());
        check(family, &case, &streams, &rows).unwrap();
    }
}

/// The result of a layer in training: its output, the gradient of its input and those of its deltas.
struct Found {
    output: Tensor,
    d_x: Tensor,
    gradients: LayerGradients,
}

fn run_layer<O: LayerOps>(layer: &TrainingLayer<'_, O>, x: &Tensor, gradient: &Tensor) -> Result<Found> {
    let (config, ops) = (&layer.model.config, layer.ops);
    let (tokens, hidden) = x.dims2()?;
    let queries = layer.rows.ends.map(|ends| ends.dim(0)).transpose()?;
    let sizes = LayerSizes {
        config,
        tokens,
        queries,
        rank: 64,
    };
    let (mut saved, mut space) = (SavedLayer::new(ops, &sizes)?, GradientBuffers::new(ops, &sizes)?);
    let (x, gradient) = (ops.copy_of(x)?, ops.copy_of(gradient)?);
    let mut output = ops.buffer(queries.unwrap_or(tokens) * hidden)?;
    let mut d_x = ops.factor(tokens * hidden)?;
    layer.forward(&x, &mut saved, &mut output)?;
    let gradients = layer.backward(&x, &mut saved, &mut space, &gradient, Some(&mut d_x))?;
    Ok(Found {
        output: ops.to_tensor(&output, hidden)?,
        d_x: ops.to_tensor(&d_x, hidden)?,
        gradients,
    })
}

/// Panics unless the tensors differ by at most `tolerance` of the largest expected value.
fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) -> Result<()> {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let scale = expected.abs()?.max_all()?.to_scalar::<f32>()?;
    let difference = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(difference <= tolerance * scale, "{what}: {difference} of {scale}");
    Ok(())
}

/// Compares every layer with the serving pass (1e-5 of the largest value), and every gradient with plain operations
/// (1e-4 of the largest value).
fn check_layers(outputs: OutputPositions) {
    with_pass(outputs, |family, case, streams, rows| {
        let model = &case.model;
        let pass = model.inputs(PackedRows::new(rows)?, outputs)?;
        for (index, pair) in streams.windows(2).enumerate() {
            let layer = &model.layers[index];
            let angles = pass.angles.of(&layer.config.rope);
            let is_last = index + 1 == model.layers.len();
            let (spans, ends) = match &pass.last {
                Some((spans, ends)) if is_last => (spans, Some(ends)),
                _ => (&pass.spans, None),
            };
            let query_angles = match ends {
                Some(ends) => angles.select(ends, None)?,
                None => angles.clone(),
            };
            let layer = TrainingLayer {
                ops: &CpuOps::default(),
                model,
                layer,
                rows: RowLayout {
                    spans,
                    ends,
                    angles,
                    query_angles: &query_angles,
                    prefix: PREFIX,
                },
            };
            let gradient = random(pair[1].shape(), 7)?;
            let found = run_layer(&layer, &pair[0], &gradient)?;
            let name = |what: &str| format!("{family} layer {index} {what}");
            assert_close(&name("output"), &found.output, &pair[1], 1e-5)?;

            let x = Var::from_tensor(&pair[0])?;
            let plain = PlainRows {
                spans,
                ends,
                angles,
                prefix: PREFIX,
            };
            let y = model.differentiable_layer(index, x.as_tensor(), &plain)?;
            let expected = (y * &gradient)?.sum_all()?.backward()?;
            assert_close(&name("input"), &found.d_x, expected.get(x.as_tensor()).unwrap(), 1e-4)?;
            assert_eq!(found.gradients.len(), Projection::ALL.len());
            for (projection, [a, b]) in case.variables_of(index) {
                let (_, (found_a, found_b)) = found.gradients.iter().find(|(found, _)| found == projection).unwrap();
                for (what, found, var) in [("A", found_a, a), ("B", found_b, b)] {
                    let expected = expected.get(var.as_tensor()).unwrap();
                    assert_close(&name(&format!("{projection:?} {what}")), found, expected, 1e-4)?;
                }
            }
        }
        Ok(())
    });
}

#[test]
fn layers_and_gradients_equal_plain_operations_at_all_positions() {
    check_layers(OutputPositions::All);
}

#[test]
fn layers_and_gradients_equal_plain_operations_at_last_positions() {
    check_layers(OutputPositions::Last { skip: 1 });
}

/// Without the gradient of its input, a layer returns the same gradients of its deltas.
#[test]
fn gradients_of_deltas_do_not_depend_on_whether_that_of_the_input_is_needed() -> Result<()> {
    let case = Case::new("gemma3");
    let tokens: Vec<u32> = (0..30).collect();
    let rows = [PackedRow {
        own: &tokens,
        shared: 0,
    }];
    let pass = case.model.inputs(PackedRows::new(&rows)?, OutputPositions::All)?;
    let (layer, ops) = (&case.model.layers[0], &CpuOps::default());
    let angles = pass.angles.of(&layer.config.rope);
    let layer = TrainingLayer {
        ops,
        model: &case.model,
        layer,
        rows: RowLayout {
            spans: &pass.spans,
            ends: None,
            angles,
            query_angles: angles,
            prefix: tokens.len(),
        },
    };
    let hidden = case.model.config.hidden_size;
    let [x, gradient] = [1, 2].map(|seed| random((tokens.len(), hidden), seed).unwrap());
    let expected = run_layer(&layer, &x, &gradient)?.gradients;
    let sizes = LayerSizes {
        config: &case.model.config,
        tokens: tokens.len(),
        queries: None,
        rank: 64,
    };
    let (mut saved, mut space) = (SavedLayer::new(ops, &sizes)?, GradientBuffers::new(ops, &sizes)?);
    let (x, gradient) = (ops.copy_of(&x)?, ops.copy_of(&gradient)?);
    layer.forward(&x, &mut saved, &mut ops.buffer(tokens.len() * hidden)?)?;
    let found = layer.backward(&x, &mut saved, &mut space, &gradient, None)?;
    for ((projection, (a, b)), (_, expected)) in found.iter().zip(&expected) {
        for (found, expected) in [(a, &expected.0), (b, &expected.1)] {
            assert!(found.device().same_device(&Device::Cpu));
            assert_close(&format!("{projection:?}"), found, expected, 0.0)?;
        }
    }
    Ok(())
}
