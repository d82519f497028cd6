//! Reads the sections of the settings into their validated types.
//!
//! Each function reads all keys of its section before it returns, so that all faults are found at once.

use std::collections::BTreeMap;
use std::time::Duration;

use super::reader::{SettingValue, SettingsReader};
use super::{
    BatchConfig, CacheConfig, DeviceChoice, DtypeChoice, HttpConfig, LimitsConfig, LogConfig, LogFormat, LogLevel,
    ModelConfig, NotInScope, PolicyConfig, PromptConfig, Quantize, ShutdownConfig, ThresholdSettings,
};

/// The maximum of `batch.linger`: with a longer wait, a micro-batch would act as a queue.
const MAX_LINGER: Duration = Duration::from_secs(5);

/// The maximum of `shutdown.grace`: the stop timeouts of service managers are shorter.
const MAX_GRACE: Duration = Duration::from_secs(600);

pub(super) fn model(reader: &mut SettingsReader) -> Option<ModelConfig> {
    let path = reader.optional_path("model.path");
    let adapter = reader.optional_path("model.adapter");
    let download = reader.bool("model.download");
    let quantizations = [
        ("none", Quantize::None),
        ("int8", Quantize::Int8),
        ("fp8", Quantize::Fp8),
    ];
    let quantize = reader.choice("model.quantize", &quantizations);
    let device = device(reader);
    let dtypes = [
        ("auto", DtypeChoice::Auto),
        ("f32", DtypeChoice::F32),
        ("bf16", DtypeChoice::Bf16),
    ];
    let dtype = reader.choice("model.dtype", &dtypes);
    Some(ModelConfig {
        path,
        adapter,
        download: download?,
        device: device?,
        dtype: dtype?,
        quantize: quantize?,
    })
}

fn device(reader: &mut SettingsReader) -> Option<DeviceChoice> {
    let name = reader.string("model.device")?;
    let choice = match name.split_once(':') {
        None if name == "auto" => Some(DeviceChoice::Auto),
        None if name == "cpu" => Some(DeviceChoice::Cpu),
        Some(("cuda", ordinal)) => ordinal.parse().ok().map(DeviceChoice::Cuda),
        _ => None,
    };
    if choice.is_none() {
        reader.fault("model.device", "expected \"auto\", \"cpu\" or \"cuda:N\"");
    }
    choice
}

pub(super) fn batch(reader: &mut SettingsReader) -> Option<BatchConfig> {
    let max_tokens = reader.integer("batch.max_tokens", 64..=1 << 20);
    let linger = reader.duration("batch.linger", Duration::ZERO..=MAX_LINGER);
    Some(BatchConfig {
        max_tokens: max_tokens?,
        linger: linger?,
    })
}

pub(super) fn cache(reader: &mut SettingsReader) -> Option<CacheConfig> {
    let entries = reader.integer("cache.entries", 0..=1 << 24)?;
    Some(CacheConfig { entries })
}

pub(super) fn limits(reader: &mut SettingsReader) -> Option<LimitsConfig> {
    let events = reader.integer("limits.events", 100..=1_000_000);
    let bytes = reader.integer("limits.bytes", 1 << 20..=16 << 30);
    Some(LimitsConfig {
        events: events?,
        bytes: bytes?,
    })
}

pub(super) fn policy(reader: &mut SettingsReader) -> Option<PolicyConfig> {
    let found = ["policy.review", "policy.block"].map(|key| reader.find(key));
    let [review, block] = found.each_ref().map(|found| reader.probability(found.as_ref()?));
    let is_read = found
        .iter()
        .zip([review, block])
        .all(|(found, value)| found.is_none() || value.is_some());
    let thresholds = thresholds(reader, found[0].as_ref(), ThresholdSettings { review, block });
    let from_adapter = reader.bool("policy.from_adapter");
    let choices = [("review", NotInScope::Review), ("decide", NotInScope::Decide)];
    let not_in_scope = reader.choice("policy.not_in_scope", &choices);
    let mut communities = BTreeMap::new();
    for (id, community) in reader.entries("policy.communities") {
        if let Some(thresholds) = community_thresholds(reader, &community, ThresholdSettings { review, block }) {
            communities.insert(id, thresholds);
        }
    }
    Some(PolicyConfig {
        from_adapter: from_adapter?,
        not_in_scope: not_in_scope?,
        thresholds: thresholds.filter(|_| is_read)?,
        communities,
    })
}

/// Reads the thresholds of a community. `general` are those of the section, for those that it does not set.
fn community_thresholds(
    reader: &mut SettingsReader,
    community: &SettingValue,
    general: ThresholdSettings,
) -> Option<ThresholdSettings> {
    let Some(entries) = community.table() else {
        reader.reject(community, "expected a table with `review`, `block` or both");
        return None;
    };
    let ThresholdSettings { mut review, mut block } = general;
    let mut is_read = true;
    for (name, found) in &entries {
        match name.as_str() {
            "review" => review = reader.probability(found),
            "block" => block = reader.probability(found),
            _ => {
                reader.reject_without_value(found, "unknown key, expected `review` or `block`");
                continue;
            }
        }
        is_read &= if name == "review" { review } else { block }.is_some();
    }
    let setting = entries.get("review").or(entries.get("block"));
    thresholds(reader, setting, ThresholdSettings { review, block }).filter(|_| is_read)
}

/// Returns the thresholds if `review` is not greater than `block`, and otherwise reports a fault in `setting`.
fn thresholds(
    reader: &mut SettingsReader,
    setting: Option<&SettingValue>,
    thresholds: ThresholdSettings,
) -> Option<ThresholdSettings> {
    let (Some(review), Some(block)) = (thresholds.review, thresholds.block) else {
        return Some(thresholds);
    };
    if review <= block {
        return Some(thresholds);
    }
    if let Some(found) = setting {
        reader.reject(
            found,
            format!("review is {review} and block is {block}, expected review <= block"),
        );
    }
    None
}

pub(super) fn http(reader: &mut SettingsReader) -> Option<HttpConfig> {
    let listen = reader.string("http.listen")?;
    match listen.parse() {
        Ok(listen) => Some(HttpConfig { listen }),
        Err(_) => {
            reader.fault("http.listen", "expected an address and port such as \"127.0.0.1:9464\"");
            None
        }
    }
}

pub(super) fn shutdown(reader: &mut SettingsReader) -> Option<ShutdownConfig> {
    let grace = reader.duration("shutdown.grace", Duration::from_secs(1)..=MAX_GRACE)?;
    Some(ShutdownConfig { grace })
}

pub(super) fn log(reader: &mut SettingsReader) -> Option<LogConfig> {
    let format = reader.choice("log.format", &[("human", LogFormat::Human), ("json", LogFormat::Json)]);
    let levels = [
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    let level = reader.choice("log.level", &levels);
    Some(LogConfig {
        format: format?,
        level: level?,
    })
}

/// Checks settings that depend on those of another section.
pub(super) fn check_across(
    reader: &mut SettingsReader,
    prompt: Option<&PromptConfig>,
    batch: Option<&BatchConfig>,
    shutdown: Option<&ShutdownConfig>,
) {
    if let (Some(prompt), Some(batch)) = (prompt, batch)
        && let Some(window) = prompt.max_window_tokens
        && batch.max_tokens < window
    {
        reader.fault(
            "batch.max_tokens",
            format!("expected at least prompt.max_window_tokens ({window})"),
        );
    }
    if let (Some(batch), Some(shutdown)) = (batch, shutdown)
        && batch.linger >= shutdown.grace
    {
        let grace = humantime::format_duration(shutdown.grace);
        reader.fault("batch.linger", format!("expected less than shutdown.grace ({grace})"));
    }
}
