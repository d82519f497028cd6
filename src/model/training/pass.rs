//! A training pass: forward through the layers, the loss, and back.

use candle_core::{DType, Result, Tensor, bail};

use super::layer::{GradientBuffers, LayerOps, LayerSizes, RowLayout, SavedLayer, TrainingLayer};
use super::{Gradients, Trainable, TrainingBatch};
use crate::config::Loss;
use crate::model::forward::packing::{PackedRows, PassInputs};
use crate::model::kernels::RopeAngles;

impl Trainable {
    /// Computes [`Trainable::loss_and_gradients`] with the operations of a device.
    pub(super) fn pass<O: LayerOps>(&self, ops: &O, loss: Loss, batch: &TrainingBatch) -> Result<(f64, Gradients)> {
        let rows = batch.rows(&self.prefix);
        let inputs = self.model.inputs(PackedRows::new(&rows)?, batch.outputs)?;
        let last_angles = match (&inputs.last, self.model.layers.last()) {
            (Some((_, ends)), Some(last)) => Some(
                inputs
                    .angles
                    .of(&last.config.rope)
                    .select(ends, inputs.last_positions.as_ref())?,
            ),
            _ => None,
        };
        let mut pass = Pass::new(self, ops, &inputs, last_angles.as_ref())?;
        let residual = pass.forward(&inputs.tokens)?;
        let hidden = pass.final_norm(&residual)?;
        let (value, gradient) = self.cross_entropy(loss, &hidden, &batch.targets)?;
        let gradient = pass.final_norm_backward(&residual, &gradient)?;
        let gradients = pass.backward(gradient)?;
        Ok((value.wait()?, gradients))
    }
}

/// A pass over the layers of a model.
struct Pass<'a, O: LayerOps> {
    trainable: &'a Trainable,
    ops: &'a O,
    inputs: &'a PassInputs,
    /// Number of tokens of all rows.
    tokens: usize,
    /// Number of positions whose output is needed.
    queries: usize,
    /// The angles of these positions in the last layer, if they are not all positions.
    last_angles: Option<&'a RopeAngles>,
    /// The largest rank of a delta.
    rank: usize,
    /// The input of each layer, (tokens, hidden), until its backward pass.
    layer_inputs: Vec<O::Buffer>,
    /// What the layers save that come first and are computed again.
    shared: Option<SavedLayer<O::Buffer>>,
    /// What the other layers save, until their backward pass.
    kept: Vec<SavedLayer<O::Buffer>>,
}

impl<'a, O: LayerOps> Pass<'a, O> {
    fn new(
        trainable: &'a Trainable,
        ops: &'a O,
        inputs: &'a PassInputs,
        last_angles: Option<&'a RopeAngles>,
    ) -> Result<Self> {
        let tokens = inputs.tokens.dim(0)?;
        let ranks = trainable.variables.values().map(|lora| lora.a.dim(0));
        let rank = ranks.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(0);
        let queries = match &inputs.last {
            None => tokens,
            Some((_, ends)) => ends.dim(0)?,
        };
        Ok(Self {
            trainable,
            ops,
            inputs,
            tokens,
            queries,
            last_angles,
            rank,
            layer_inputs: Vec::new(),
            shared: None,
            kept: Vec::new(),
        })
    }

    /// Returns the residual stream after the last layer: (queries, hidden).
    fn forward(&mut self, tokens: &Tensor) -> Result<O::Buffer> {
        let model = &self.trainable.model;
        let embedded = (model.embedding_rows(&model.embed_tokens, tokens)? * model.config.embedding_scale())?;
        let mut x = self.ops.copy_of(&embedded)?;
        let recomputed = self.recomputed_layers()?;
        for index in 0..model.layers.len() {
            let rows = if self.is_last(index) { self.queries } else { self.tokens };
            let mut out = self.ops.buffer(rows * model.config.hidden_size)?;
            let layer = self.layer(index);
            if index < recomputed {
                let saved = match self.shared.take() {
                    Some(saved) => saved,
                    None => SavedLayer::new(self.ops, &self.sizes(index))?,
                };
                let saved = self.shared.insert(saved);
                layer.forward(&x, saved, &mut out)?;
            } else {
                let mut saved = SavedLayer::new(self.ops, &self.sizes(index))?;
                layer.forward(&x, &mut saved, &mut out)?;
                self.kept.push(saved);
            }
            self.layer_inputs.push(std::mem::replace(&mut x, out));
        }
        Ok(x)
    }

    /// Returns the normalised hidden states: (queries, hidden).
    fn final_norm(&self, residual: &O::Buffer) -> Result<Tensor> {
        let model = &self.trainable.model;
        let hidden = model.config.hidden_size;
        let mut normed = self.ops.buffer(self.queries * hidden)?;
        self.ops
            .rms_norm(residual, &model.norm, model.config.rms_norm_eps, &mut normed)?;
        self.ops.to_tensor(&normed, hidden)
    }

    /// Returns the gradient with respect to the input of the final norm, given that of its output.
    fn final_norm_backward(&self, residual: &O::Buffer, gradient: &Tensor) -> Result<O::Buffer> {
        let model = &self.trainable.model;
        let gradient = self.ops.copy_of(&gradient.to_dtype(DType::F32)?.contiguous()?)?;
        let mut out = self.ops.factor(self.queries * model.config.hidden_size)?;
        let eps = model.config.rms_norm_eps;
        self.ops
            .rms_norm_backward(residual, &model.norm, eps, &gradient, None, &mut out)?;
        Ok(out)
    }

    /// Returns the adapter's gradients, given that of the last layer's output.
    fn backward(&mut self, mut gradient: O::Buffer) -> Result<Gradients> {
        let trainable = self.trainable;
        let mut gradients = Gradients::new();
        // The gradient of an input is needed only if a layer before has variables.
        let Some(first) = trainable.variables.keys().map(|(layer, _)| *layer).min() else {
            return Ok(gradients);
        };
        let width = trainable.model.config.hidden_size;
        // The last layer can have fewer rows than the others, which share what they write.
        let (mut space, mut spare, mut output) = (None, None, None);
        for index in (first..trainable.model.layers.len()).rev() {
            let Some(x) = self.layer_inputs.pop() else {
                bail!("layer {index} has no recorded input")
            };
            let (layer, sizes) = (self.layer(index), self.sizes(index));
            let mut kept = self.kept.pop();
            let saved = match (&mut kept, &mut self.shared) {
                (Some(saved), _) => saved,
                (None, Some(saved)) => {
                    let mut out = match output.take() {
                        Some(out) => out,
                        None => self.ops.buffer(self.tokens * width)?,
                    };
                    layer.forward(&x, saved, &mut out)?;
                    output = Some(out);
                    saved
                }
                (None, None) => bail!("layer {index} has saved nothing"),
            };
            let mut d_x = match spare.take() {
                Some(spare) => spare,
                None => self.ops.factor(self.tokens * width)?,
            };
            let mut own_space = match space.take() {
                Some(space) => space,
                None => GradientBuffers::new(self.ops, &sizes)?,
            };
            let needed = (index > first).then_some(&mut d_x);
            for (projection, found) in layer.backward(&x, saved, &mut own_space, &gradient, needed)? {
                gradients.insert((index, projection), found);
            }
            if sizes.queries.is_none() {
                (space, spare) = (Some(own_space), Some(gradient));
            }
            gradient = d_x;
        }
        if let Some(key) = trainable.variables.keys().find(|key| !gradients.contains_key(key)) {
            bail!("the gradients of layer {} {} are missing", key.0, key.1.name());
        }
        Ok(gradients)
    }

    /// Returns how many layers are computed again in the backward pass, because there is no room to keep what they save.
    /// The last layer is always kept.
    fn recomputed_layers(&self) -> Result<usize> {
        let layers = self.trainable.model.layers.len();
        let bytes = self.sizes(0).saved_elements() * size_of::<f32>();
        let room = self.ops.bytes_to_keep()? / bytes.max(1);
        Ok(layers.saturating_sub(room.max(1)))
    }

    fn is_last(&self, index: usize) -> bool {
        index + 1 == self.trainable.model.layers.len()
    }

    fn sizes(&self, index: usize) -> LayerSizes<'a> {
        LayerSizes {
            config: &self.trainable.model.config,
            tokens: self.tokens,
            queries: (self.is_last(index) && self.inputs.last.is_some()).then_some(self.queries),
            rank: self.rank,
        }
    }

    fn layer(&self, index: usize) -> TrainingLayer<'a, O> {
        let model = &self.trainable.model;
        let layer = &model.layers[index];
        let angles = self.inputs.angles.of(&layer.config.rope);
        let rows = RowLayout {
            spans: &self.inputs.spans,
            ends: None,
            angles,
            query_angles: angles,
            prefix: self.trainable.prefix.len(),
        };
        let rows = match (&self.inputs.last, self.last_angles) {
            (Some((spans, ends)), Some(query_angles)) if self.is_last(index) => RowLayout {
                spans,
                ends: Some(ends),
                query_angles,
                ..rows
            },
            _ => rows,
        };
        TrainingLayer {
            ops: self.ops,
            model,
            layer,
            rows,
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::config::{Projection, Quantize};
    use crate::model::device::Placement;
    use crate::model::files::checkpoint::Checkpoint;
    use crate::model::forward::gemma::Gemma;
    use crate::model::forward::linear::LoraMode;
    use crate::model::forward::load::LoadOptions;
    use crate::model::kernels::tests::random;
    use crate::model::training::layer::CpuOps;
    use crate::model::training::{Example, LoraVariables, Variables};

    /// Returns a model with deltas on some layers and projections.
    fn trainable(targets: &[(usize, Projection)]) -> Trainable {
        let folder = crate::test_files::test_file("tests/fixtures/gemma3");
        let options = LoadOptions {
            lora: LoraMode::Unmerged,
            quantize: Quantize::None,
            placement: Placement::cpu(),
            for_training: true,
        };
        let model = Gemma::load(&Checkpoint::open(&folder).unwrap(), None, options).unwrap();
        let mut variables = Variables::new();
        for &(layer, projection) in targets {
            let [outputs, inputs] = projection.shape(&model.config);
            let var =
                |shape: (usize, usize), seed| candle_core::Var::from_tensor(&random(shape, seed).unwrap()).unwrap();
            let (a, b) = (var((4, inputs), 1), var((outputs, 4), 2));
            variables.insert((layer, projection), LoraVariables { a, b, scale: 0.1 });
        }
        let prefix: Vec<u32> = (100..120).collect();
        Trainable::new(model, variables, &prefix, [367, 368], 1)
    }

    fn run(trainable: &Trainable, loss: Loss, bytes_to_keep: usize) -> (f64, Vec<Vec<f32>>) {
        let prompts: Vec<Vec<u32>> = vec![(100..140).collect(), (100..131).collect()];
        let examples: Vec<Example<'_>> = prompts
            .iter()
            .map(|tokens| Example {
                tokens,
                hateful: 1.0,
                weight: 1.0,
            })
            .collect();
        let batch = TrainingBatch::new(trainable, loss, &examples).unwrap();
        let (value, gradients) = trainable.pass(&CpuOps { bytes_to_keep }, loss, &batch).unwrap();
        let tensors = gradients.into_values().flat_map(|(a, b)| [a, b]);
        let values = tensors.map(|x| x.flatten_all().unwrap().to_vec1().unwrap());
        (value, values.collect())
    }

    /// The bits of the gradients do not depend on how many layers are computed again.
    #[test]
    fn layers_that_are_computed_again_give_the_same_gradients() {
        let all = (0..4).flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)));
        let trainable = trainable(&all.collect::<Vec<_>>());
        for loss in [Loss::Label, Loss::Sequence] {
            let bytes = LayerSizes {
                config: &trainable.model.config,
                tokens: 20 + 20 + 11,
                queries: None,
                rank: 4,
            };
            let bytes = bytes.saved_elements() * size_of::<f32>();
            let expected = run(&trainable, loss, usize::MAX);
            for kept in [0, 2, 3] {
                assert_eq!(
                    run(&trainable, loss, kept * bytes + bytes / 2),
                    expected,
                    "{kept} {loss:?}"
                );
            }
        }
    }

    /// The backward pass ends at the first layer that has variables.
    #[test]
    fn layers_before_the_first_variable_change_no_gradient() {
        let few = [(2, Projection::K), (3, Projection::Down)];
        let found = run(&trainable(&few), Loss::Label, usize::MAX).1;
        assert_eq!(found.len(), 4);
        let mut more = few.to_vec();
        more.push((0, Projection::Q));
        // A delta with B of zeros changes nothing but adds two gradients.
        let more = trainable(&more);
        let b = &more.variables[&(0, Projection::Q)].b;
        b.set(&b.zeros_like().unwrap()).unwrap();
        let all = run(&more, Loss::Label, usize::MAX).1;
        assert_eq!(all.len(), 6);
        assert_eq!(found, all[2..]);
    }
}
