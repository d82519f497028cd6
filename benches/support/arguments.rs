//! The arguments of a benchmark.

/// Returns the value of an argument, the last one if it is given several times.
pub fn argument(name: &str) -> Option<String> {
    arguments(name).pop()
}

/// Returns the values of an argument that may be given several times.
pub fn arguments(name: &str) -> Vec<String> {
    let all: Vec<String> = std::env::args().collect();
    let given = all.windows(2).filter(|pair| pair[0] == name);
    given.map(|pair| pair[1].clone()).collect()
}

/// Returns whether an argument without a value is given.
pub fn has_flag(name: &str) -> bool {
    std::env::args().any(|argument| argument == name)
}
