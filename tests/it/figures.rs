//! The figures in README are those of a result file.

use std::fs;
use std::path::Path;

#[test]
fn the_table_of_cpu_speeds_is_that_of_a_result_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let tables: Vec<String> = fs::read_dir(root.join("benches/results"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .map(|path| fs::read_to_string(path).unwrap())
        .filter_map(|text| {
            text.split("\n\n")
                .find(|part| part.starts_with("| |"))
                .map(str::to_owned)
        })
        .collect();
    assert!(!tables.is_empty(), "no result file has a table");
    let shown = |table: &String| readme.contains(table.trim_end());
    assert!(
        tables.iter().any(shown),
        "README shows none of the tables in benches/results"
    );
}
