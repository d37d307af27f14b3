// The library: one translation unit, compiled once for each level of instructions.
#include "albireo_cpu.h"

#include "executor.h"
#include "measure.h"
#include "pack.h"

#if ALBIREO_ISA == 3
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" {

int albireo_abi(int64_t sizes[ALBIREO_NUM_SIZES]) {
  const int64_t all[ALBIREO_NUM_SIZES] = {
      sizeof(AlbireoMatrix),     sizeof(AlbireoRows),          sizeof(AlbireoStep),     sizeof(AlbireoOp),
      sizeof(AlbireoProgram),    sizeof(AlbireoEdits),         sizeof(AlbireoHistories), sizeof(AlbireoLogprobs),
      sizeof(AlbireoCandidates), sizeof(AlbireoTokenLogprobs), sizeof(AlbireoExchange), sizeof(AlbireoSelect),
      sizeof(AlbireoDraw),       sizeof(AlbireoPublish),       ALBIREO_MAX_RANKS,       ALBIREO_NUM_RECENT,
  };
  std::copy_n(all, ALBIREO_NUM_SIZES, sizes);
  return ALBIREO_ABI;
}

int albireo_isa(void) { return albireo::kIsa; }

int albireo_allow_isa(void) {
#if ALBIREO_ISA == 3 && defined(__AMX_TILE__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 1;
#endif
}

int albireo_input_dtype(int weight_dtype) {
  switch (weight_dtype) {
    case ALBIREO_FLOAT32: return albireo::Types<ALBIREO_FLOAT32>::kInput;
    case ALBIREO_BFLOAT16: return albireo::Types<ALBIREO_BFLOAT16>::kInput;
    default: return albireo::Types<ALBIREO_INT8>::kInput;
  }
}

int64_t albireo_matrix_bytes(int dtype, int32_t num_out, int32_t num_in, int32_t *padded_in) {
  *padded_in = albireo::padded_in(dtype, num_in);
  return albireo::num_panels(num_out) * albireo::panel_bytes(dtype, num_in);
}

void albireo_pack(const AlbireoMatrix *target, const void *rows, int from_dtype, int64_t stride, int32_t num_rows,
                  int32_t first_panel, int32_t panel_step) {
  albireo::pack(*target, rows, from_dtype, stride, num_rows, first_panel, panel_step);
}

void albireo_unpack(const AlbireoMatrix *source, float *rows, int64_t stride) { albireo::unpack(*source, rows, stride); }

int64_t albireo_sample_scratch_bytes(int32_t vocab_size) { return albireo::sample_scratch_bytes(vocab_size); }

AlbireoDevice *albireo_device_open(const int32_t *cores, int32_t num_threads) {
  return albireo::open_device(cores, num_threads);
}

void albireo_device_close(AlbireoDevice *device) {
  device->close();
  delete device;
}

int64_t albireo_group_bytes(void) { return albireo::round_up(sizeof(albireo::Group), 4096); }

int albireo_join(AlbireoDevice *device, void *memory, int32_t rank, int32_t size, int64_t timeout_ns) {
  return albireo::join_group(*device, memory, rank, size, timeout_ns);
}

void albireo_leave(AlbireoDevice *device) { albireo::leave_group(*device); }

void albireo_submit(AlbireoDevice *device, const AlbireoProgram *forward, const AlbireoProgram *sample, AlbireoStep *step) {
  device->submit({forward, sample, step});
}

int albireo_wait(AlbireoDevice *, AlbireoStep *step, int64_t timeout_ns) { return albireo::wait_for(*step, timeout_ns); }

void albireo_abort(AlbireoDevice *device) { device->team.is_aborted.store(true); }

uint64_t albireo_read_memory(const void *from, int64_t num_bytes) {
  return albireo::read_memory((const char *)from, num_bytes);
}

int64_t albireo_multiply_in_cache(int weight_dtype, int64_t num_rounds) {
  switch (weight_dtype) {
    case ALBIREO_FLOAT32: return albireo::multiply_in_cache<ALBIREO_FLOAT32>(num_rounds);
    case ALBIREO_BFLOAT16: return albireo::multiply_in_cache<ALBIREO_BFLOAT16>(num_rounds);
    default: return albireo::multiply_in_cache<ALBIREO_INT8>(num_rounds);
  }
}

}  // extern "C"
