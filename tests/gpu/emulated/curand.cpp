// The functions of cuRAND that candle calls to create a generator. None of the tests draws numbers on the device.

extern "C" {

int curandCreateGenerator(void **generator, int) {
    *generator = nullptr;
    return 0;
}
int curandDestroyGenerator(void *) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }
int curandSetStream(void *, void *) { return 0; }

}
