//! Weighted logistic regression of targets between 0 and 1 on one variable.
//!
//! The loss is convex and has a single minimum. Newton's method with step halving finds it to rounding precision. If it
//! does not converge, no line is returned.

/// Maximum number of Newton steps. About ten suffice, so reaching the limit means that the fit has failed.
pub(super) const MAX_STEPS: usize = 100;

/// Largest gradient that counts as zero, for weights that sum to one.
const TOLERANCE: f64 = 1e-10;

/// The parameters of the line that are fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parameters {
    /// The intercept stays 0.
    Slope,
    SlopeAndIntercept,
}

/// The rows that the line is fitted to.
pub(super) struct Regression {
    /// Variable, target and share of the total weight.
    rows: Vec<[f64; 3]>,
    /// Log-odds at which the intercept starts.
    prior: f64,
}

/// The loss and its derivatives at one slope and intercept.
struct LocalLoss {
    loss: f64,
    gradient: [f64; 2],
    /// The distinct second derivatives: slope, mixed, intercept.
    hessian: [f64; 3],
}

impl LocalLoss {
    /// Compares the gradient with a tolerance that is scaled to the size of the variable.
    fn gradient_is_below(&self, tolerance: f64) -> bool {
        let scale = self.hessian[0].sqrt().max(1.0);
        self.gradient[0].abs() <= tolerance * scale && self.gradient[1].abs() <= tolerance
    }

    fn newton_step(&self) -> [f64; 2] {
        let ([g1, g2], [h11, h12, h22]) = (self.gradient, self.hessian);
        // A small ridge, as in Lin, Lin and Weng (2007), bounds the step where the loss is flat.
        let [h11, h22] = [h11 + 1e-12 * h11.max(1.0), h22 + 1e-12];
        let determinant = h11 * h22 - h12 * h12;
        [
            -(h22 * g1 - h12 * g2) / determinant,
            -(h11 * g2 - h12 * g1) / determinant,
        ]
    }
}

impl Regression {
    /// Takes rows of variable, target and weight. Weights must be positive and are normalised to sum to one. `prior` is
    /// the log-odds at which the intercept starts.
    pub(super) fn new(rows: impl Iterator<Item = [f64; 3]>, prior: f64) -> Self {
        let mut rows: Vec<[f64; 3]> = rows.collect();
        let total: f64 = rows.iter().map(|[_, _, weight]| weight).sum();
        rows.iter_mut().for_each(|[_, _, weight]| *weight /= total);
        Self { rows, prior }
    }

    /// Returns the slope and intercept that minimise the loss, or `None` if the method does not converge.
    pub(super) fn minimise(&self, parameters: Parameters) -> Option<[f64; 2]> {
        let mut point = match parameters {
            Parameters::Slope => [0.0, 0.0],
            Parameters::SlopeAndIntercept => [0.0, self.prior],
        };
        let mut here = self.loss_at(point, parameters);
        for _ in 0..MAX_STEPS {
            if here.gradient_is_below(TOLERANCE) {
                return Some(point);
            }
            let direction = here.newton_step();
            let descent = here.gradient[0] * direction[0] + here.gradient[1] * direction[1];
            // Close to the minimum, the expected decrease is smaller than the rounding error of the loss. The full step
            // is then the right one, and must not be rejected.
            let rounding = 1e-14 * (1.0 + here.loss);
            let mut step = 1.0;
            loop {
                let next = [point[0] + step * direction[0], point[1] + step * direction[1]];
                let there = self.loss_at(next, parameters);
                if there.loss <= here.loss + 1e-4 * step * descent + rounding {
                    (point, here) = (next, there);
                    break;
                }
                step /= 2.0;
                if step < 1e-10 {
                    return None;
                }
            }
        }
        None
    }

    fn loss_at(&self, [slope, intercept]: [f64; 2], parameters: Parameters) -> LocalLoss {
        let mut local = LocalLoss {
            loss: 0.0,
            gradient: [0.0; 2],
            hessian: [0.0; 3],
        };
        for &[x, target, share] in &self.rows {
            let z = slope * x + intercept;
            local.loss += share * (softplus(z) - target * z);
            let probability = (-softplus(-z)).exp();
            let (error, curvature) = (
                share * (probability - target),
                share * probability * (-softplus(z)).exp(),
            );
            local.gradient[0] += error * x;
            local.gradient[1] += error;
            local.hessian[0] += curvature * x * x;
            local.hessian[1] += curvature * x;
            local.hessian[2] += curvature;
        }
        if parameters == Parameters::Slope {
            (local.gradient[1], local.hessian[1], local.hessian[2]) = (0.0, 0.0, 1.0);
        }
        local
    }
}

/// Returns `log(1 + e^x)`, computed without overflow.
pub(super) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
