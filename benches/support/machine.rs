//! The machine that a benchmark runs on, as its results name it.

use std::path::PathBuf;

/// Returns the name of the processor, with the vector instructions that matter here.
pub fn cpu_model() -> String {
    let flags = field("flags");
    let flags: Vec<&str> = flags.split(' ').collect();
    let known = [
        ("avx512f", "avx512"),
        ("avx512_vnni", "vnni"),
        ("avx512_bf16", "bf16"),
        ("amx_int8", "amx"),
    ];
    let known: Vec<&str> = known
        .iter()
        .filter(|(flag, _)| flags.contains(flag))
        .map(|(_, name)| *name)
        .collect();
    format!("{} {}", field("model name"), known.join(" ")).trim().to_owned()
}

/// Returns a field of the first processor, or an empty text if it is not known.
pub fn field(name: &str) -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':'))
        .map_or_else(String::new, |(_, value)| value.trim().to_owned())
}

/// Returns the path of the results of a benchmark on a processor, without an extension.
pub fn results_file(benchmark: &str, cpu: &str) -> PathBuf {
    let slug = cpu
        .to_lowercase()
        .replace(|character: char| !character.is_ascii_alphanumeric(), "-");
    let words: Vec<&str> = slug.split('-').filter(|word| !word.is_empty()).collect();
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    folder.join(format!("{benchmark}-{}", words.join("-")))
}
