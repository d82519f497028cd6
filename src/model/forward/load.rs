//! Loads a decoder from an open checkpoint and adapter. Reports every tensor that is missing or misshapen.

use std::sync::Arc;

use candle_core::{DType, Result as CandleResult, Tensor};

use super::gemma::{DecoderLayer, Gemma};
#[cfg(feature = "cuda")]
use super::gemma::{StackedMlp, StackedWeights};
#[cfg(feature = "cuda")]
use super::gpu::{Fp8Mlp, GpuDecoder};
use super::linear::{FrozenWeight, Linear, LoraMode};
use super::rope::RopeTables;
use crate::config::{Projection, Quantize};
use crate::fault::{Fault, Faults};
use crate::model::device::Placement;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::lora::{Adapter, LoraWeights};
use crate::model::transfer::Transfer;
use crate::model::transfer::upload::WeightUpload;

/// How to load weights.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// How the adapter is combined with the base. It is never merged into weights that are not f32.
    pub lora: LoraMode,
    /// Whether the frozen weights are quantised.
    pub quantize: Quantize,
    /// The device, and the dtype of linear layers.
    pub placement: Placement,
    /// Whether an adapter will be trained. On the CPU, the weights are then not packed, because training multiplies by
    /// them in both directions. They are never quantised.
    pub for_training: bool,
}

impl Gemma {
    /// Loads the weights onto the device, and checks their names, shapes and values.
    ///
    /// # Errors
    /// Returns every fault found in the weight files.
    pub fn load(checkpoint: &Checkpoint, adapter: Option<&Adapter>, options: LoadOptions) -> Result<Self, Faults> {
        let config = checkpoint.config();
        let device = options.placement.device.clone();
        let mut loader = Loader {
            checkpoint,
            adapter,
            options,
            upload: WeightUpload::new(&device),
            faults: Faults::default(),
        };
        loader.check_names();
        #[cfg(feature = "cuda")]
        loader.check_fp8();
        #[cfg(feature = "cuda")]
        if !loader.faults.is_empty() {
            // The kernels must not see sizes that they do not support.
            return Err(loader.faults);
        }
        let table = [config.vocab_size, config.hidden_size];
        let embed_tokens = checkpoint.read_as_stored(&[("embed_tokens.weight", table)], &loader.upload);
        let embed_tokens = loader.faults.collect(embed_tokens);
        let lm_head = loader.faults.collect(checkpoint.read_lm_head(table, &loader.upload));
        let norm = loader.norm("norm", config.hidden_size);
        let layers: Vec<Option<DecoderLayer>> = (0..config.num_layers()).map(|index| loader.layer(index)).collect();
        let (Some(embed_tokens), Some(norm), true) = (embed_tokens, norm, loader.faults.is_empty()) else {
            return Err(loader.faults);
        };
        let gemma = Self {
            config: config.clone(),
            embed_tokens,
            lm_head: lm_head.flatten(),
            layers: layers.into_iter().flatten().collect(),
            norm,
            ropes: Arc::new(RopeTables::new(config)),
            transfer: Arc::new(Transfer::new(&device)),
            device,
            dtype: loader.options.placement.dtype,
            #[cfg(feature = "cuda")]
            gpu: None,
        };
        #[cfg(feature = "cuda")]
        let gemma = loader.with_gpu_decoder(gemma)?;
        Ok(gemma)
    }
}

/// The weights of one layer by projection, in the order of [`Projection::ALL`], as far as they have been read.
type ProjectionWeights = [Option<Tensor>; Projection::ALL.len()];

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    adapter: Option<&'a Adapter>,
    options: LoadOptions,
    upload: WeightUpload,
    faults: Faults,
}

impl Loader<'_> {
    /// Returns a computed tensor or layer, or reports a fault that names it.
    fn collect_computed<T>(&mut self, name: &str, result: CandleResult<T>) -> Option<T> {
        let folder = self.checkpoint.folder();
        let result = result.map_err(|error| Fault::file(folder, format!("cannot prepare `{name}`: {error}")));
        self.faults.collect(result)
    }

    /// Prepares the scoring pass on a GPU, if the weights were stacked for it.
    #[cfg(feature = "cuda")]
    fn with_gpu_decoder(mut self, mut gemma: Gemma) -> Result<Gemma, Faults> {
        let prepared = GpuDecoder::new(&gemma).and_then(|gpu| match (gpu, self.adapter) {
            (Some(gpu), Some(adapter)) => gpu.with_adapter(adapter).map(Some),
            (gpu, _) => Ok(gpu),
        });
        gemma.gpu = self.collect_computed("the pass on the GPU", prepared).flatten();
        if self.faults.is_empty() {
            Ok(gemma)
        } else {
            Err(self.faults)
        }
    }

    /// Reports a model whose sizes the FP8 products do not support.
    #[cfg(feature = "cuda")]
    fn check_fp8(&mut self) {
        let config = self.checkpoint.config();
        if self.is_fp8() && !GpuDecoder::supports_fp8(config) {
            let (hidden, inner) = (config.hidden_size, config.intermediate_size);
            let text = format!(
                "`fp8` supports hidden sizes that are multiples of 16 to 8192, and intermediate sizes to 32768, found \
                 {hidden} and {inner}, expected `none`"
            );
            self.faults.push(Fault::setting("model.quantize", text));
        }
    }

    /// Returns whether the weights of the MLP are loaded in FP8. Weights for training are not.
    #[cfg(feature = "cuda")]
    fn is_fp8(&self) -> bool {
        let options = &self.options;
        options.quantize == Quantize::Fp8 && !options.placement.device.is_cpu() && !options.for_training
    }

    /// Reports layer tensors that the architecture does not use: they mean that the config and the weights belong to
    /// different models.
    fn check_names(&mut self) {
        let config = self.checkpoint.config();
        let mut known: Vec<String> = Projection::ALL.iter().map(|p| format!("{}.weight", p.path())).collect();
        known.extend([
            "input_layernorm.weight".into(),
            "post_attention_layernorm.weight".into(),
        ]);
        if config.family.has_post_norms() {
            known.extend([
                "pre_feedforward_layernorm.weight".into(),
                "post_feedforward_layernorm.weight".into(),
            ]);
        }
        if config.family.has_qk_norm() {
            known.extend(["self_attn.q_norm.weight".into(), "self_attn.k_norm.weight".into()]);
        }
        // Old checkpoints contain the rotary frequencies, which also follow from the config.
        known.push("self_attn.rotary_emb.inv_freq".into());
        for name in self.checkpoint.layer_tensors() {
            let parts = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
            let expected = parts.is_some_and(|(layer, rest)| {
                layer.parse().is_ok_and(|layer: usize| layer < config.num_layers())
                    && known.iter().any(|name| name == rest)
            });
            if !expected {
                let (prefix, model_type) = (self.checkpoint.prefix(), config.family.model_type());
                let layers = config.num_layers();
                self.faults.push(Fault::file(
                    self.checkpoint.folder(),
                    format!("tensor `{prefix}{name}` is not part of a `{model_type}` of {layers} layers"),
                ));
            }
        }
    }

    /// Reads the weight of a norm. The file contains `w - 1`.
    fn norm(&mut self, name: &str, width: usize) -> Option<Tensor> {
        let weight = self
            .faults
            .collect(self.checkpoint.read_f32(&format!("{name}.weight"), &[width]))?;
        let device = &self.options.placement.device;
        self.collect_computed(name, (weight + 1.0).and_then(|weight| weight.to_device(device)))
    }

    /// Reads the weight of a linear layer: (outputs, inputs).
    fn projection_weight(&mut self, layer: usize, projection: Projection) -> Option<Tensor> {
        let shape = projection.shape(self.checkpoint.config());
        self.weight(&format!("layers.{layer}.{}.weight", projection.path()), shape)
    }

    fn linear(&mut self, layer: usize, projection: Projection, weight: Tensor) -> Option<Linear> {
        let lora = self.adapter.and_then(|adapter| adapter.get(layer, projection));
        let linear = self.prepare(weight, lora);
        self.collect_computed(&format!("layers.{layer}.{}", projection.path()), linear)
    }

    /// Returns whether the weights of projections with the same input are stacked for the scoring pass on a GPU.
    #[cfg(feature = "cuda")]
    fn is_stacking(&self) -> bool {
        let Placement { device, dtype, .. } = &self.options.placement;
        !device.is_cpu() && *dtype == DType::BF16 && !self.options.for_training
    }

    /// Reads the weights of projections with the same input onto a GPU, one below the other, (all outputs, inputs), and
    /// sets each projection's own weight to its part of the result.
    #[cfg(feature = "cuda")]
    fn stacked(&mut self, layer: usize, projections: &[Projection], weights: &mut ProjectionWeights) -> Option<Tensor> {
        let config = self.checkpoint.config();
        let named = projections.iter().map(|projection| {
            let name = format!("layers.{layer}.{}.weight", projection.path());
            (name, projection.shape(config))
        });
        let named: Vec<(String, [usize; 2])> = named.collect();
        let tensors: Vec<(&str, [usize; 2])> = named.iter().map(|(name, shape)| (name.as_str(), *shape)).collect();
        let stored = self
            .faults
            .collect(self.checkpoint.read_as_stored(&tensors, &self.upload))?;
        let mut start = 0;
        let stacked = stored.to_dtype(self.options.placement.dtype).and_then(|stacked| {
            for (projection, (_, [outputs, _])) in projections.iter().zip(&named) {
                weights[*projection as usize] = Some(stacked.narrow(0, start, *outputs)?);
                start += outputs;
            }
            Ok(stacked)
        });
        self.collect_computed(&named[0].0, stacked)
    }

    /// Brings a weight and its delta into the form in which they are multiplied.
    fn prepare(&self, weight: Tensor, lora: Option<&LoraWeights>) -> CandleResult<Linear> {
        let LoadOptions {
            lora: mode,
            quantize,
            placement,
            for_training,
        } = &self.options;
        if *for_training && placement.device.is_cpu() {
            let mut layer = Linear::new(FrozenWeight::training(&weight)?, None)?;
            if let Some(lora) = lora {
                layer.attach(lora.clone());
            }
            return Ok(layer);
        }
        match (lora, quantize, mode) {
            (Some(lora), Quantize::None, LoraMode::Merged) if weight.dtype() == DType::F32 => {
                let lora = lora.to_device(weight.device())?;
                let delta = (lora.b.matmul(&lora.a)? * lora.scale)?;
                Linear::new(FrozenWeight::new((weight + delta)?, *quantize)?, None)
            }
            // Rounding the sum of other weights would lose a small delta.
            (lora, quantize, _) => Linear::new(FrozenWeight::new(weight, *quantize)?, lora),
        }
    }

    /// Loads the weight of a linear layer onto the device and converts it to the dtype of the placement.
    fn weight(&mut self, name: &str, shape: [usize; 2]) -> Option<Tensor> {
        let Placement { device, dtype, .. } = self.options.placement.clone();
        if device.is_cpu() {
            return self.faults.collect(self.checkpoint.read_f32(name, &shape));
        }
        // Copying first and converting on the GPU avoids an f32 copy on the host.
        let weight = self.checkpoint.read_as_stored(&[(name, shape)], &self.upload);
        let weight = self.faults.collect(weight)?;
        self.collect_computed(name, weight.to_dtype(dtype))
    }

    fn layer(&mut self, index: usize) -> Option<DecoderLayer> {
        let config = self.checkpoint.config();
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let mut weights = ProjectionWeights::default();
        let mut alone = Projection::ALL.to_vec();
        #[cfg(feature = "cuda")]
        let mut mlp_is_fp8 = false;
        #[cfg(feature = "cuda")]
        let stacked = if self.is_stacking() {
            use Projection::{Down, Gate, K, O, Q, Up, V};
            alone = vec![O, Down];
            let qkv = self.stacked(index, &[Q, K, V], &mut weights);
            let gate_up = self.stacked(index, &[Gate, Up], &mut weights);
            let mlp = if self.is_fp8() {
                alone = vec![O];
                mlp_is_fp8 = true;
                // The weights in bf16 are freed.
                (weights[Gate as usize], weights[Up as usize]) = (None, None);
                let down = self.projection_weight(index, Down);
                let mlp = gate_up.zip(down).map(|(gate_up, down)| Fp8Mlp::new(&gate_up, &down));
                let mlp = mlp.and_then(|mlp| self.collect_computed(&format!("layers.{index}.mlp"), mlp));
                mlp.map(|mlp| StackedMlp::Fp8(Arc::new(mlp)))
            } else {
                gate_up.map(|gate_up| StackedMlp::Bf16 { gate_up })
            };
            qkv.zip(mlp).map(|(qkv, mlp)| StackedWeights { qkv, mlp })
        } else {
            None
        };
        for projection in alone.drain(..) {
            weights[projection as usize] = self.projection_weight(index, projection);
        }
        let mut weights = Projection::ALL.into_iter().zip(weights);
        let mut next = || {
            let (projection, weight) = weights.next()?;
            #[cfg(feature = "cuda")]
            if mlp_is_fp8 && matches!(projection, Projection::Gate | Projection::Up | Projection::Down) {
                return Linear::new(FrozenWeight::Fp8, None).ok();
            }
            self.linear(index, projection, weight?)
        };
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = std::array::from_fn(|_| next());
        let norm = |name: &str| format!("layers.{index}.{name}");
        let input_layernorm = self.norm(&norm("input_layernorm"), hidden);
        let post_attention = self.norm(&norm("post_attention_layernorm"), hidden);
        let (post_attention_norm, pre_feedforward_norm, post_feedforward_norm) = if config.family.has_post_norms() {
            let pre = self.norm(&norm("pre_feedforward_layernorm"), hidden);
            let post = self.norm(&norm("post_feedforward_layernorm"), hidden);
            (Some(post_attention?), pre, Some(post?))
        } else {
            (None, post_attention, None)
        };
        let qk_norm = if config.family.has_qk_norm() {
            let q_norm = self.norm(&norm("self_attn.q_norm"), head_dim);
            let k_norm = self.norm(&norm("self_attn.k_norm"), head_dim);
            Some((q_norm?, k_norm?))
        } else {
            None
        };
        Some(DecoderLayer {
            config: config.layers[index],
            q_proj: q_proj?,
            k_proj: k_proj?,
            v_proj: v_proj?,
            o_proj: o_proj?,
            gate_proj: gate_proj?,
            up_proj: up_proj?,
            down_proj: down_proj?,
            #[cfg(feature = "cuda")]
            stacked,
            qk_norm,
            input_layernorm: input_layernorm?,
            post_attention_norm,
            pre_feedforward_norm: pre_feedforward_norm?,
            post_feedforward_norm,
        })
    }
}
