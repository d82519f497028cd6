//! Tests of the library and the command line that need no broker. They form a single binary, because every test binary
//! links candle, librdkafka and OpenSSL.

#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test")]

#[path = "../common/mod.rs"]
mod common;

// The shape of the source tree.
mod layers;
// The alerts, the dashboard and the operator's guide.
mod figures;
mod monitoring;
mod schema;

// Settings and the command line.
mod cli_adapters;
mod cli_check;
mod cli_input;
mod documented_input;
mod cli_run;
mod cli_score;
mod cli_start;
mod api;
mod config;
mod hub;

// The model: files, prompt, forward pass.
mod bad_files;
mod batch_invariance;
mod bench_arguments;
mod bundled_model;
mod heads;
mod imitations;
mod model_defaults;
mod oracle;
mod other_models;
mod parity;
mod prompts;
mod untrusted_text;

// Training, judging and the registry.
mod evaluation;
mod registry;
mod registry_faults;
mod registry_loss;
mod report;
mod trainer;
mod training_parity;
