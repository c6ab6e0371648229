// Stands for a profiler: loaded by NVTX through NVTX_INJECTION64_PATH, prints "push DOMAIN:NAME" and "pop DOMAIN" per
// range.
#include <nvtx3/nvToolsExt.h>

#include <cstdio>
#include <cstring>

namespace {

// Handles of domains and registered strings are the copied texts themselves.
nvtxDomainHandle_t create_domain(const char* name) { return reinterpret_cast<nvtxDomainHandle_t>(strdup(name)); }

nvtxStringHandle_t register_string(nvtxDomainHandle_t, const char* text) {
  return reinterpret_cast<nvtxStringHandle_t>(strdup(text));
}

const char* text_of(nvtxDomainHandle_t domain) { return domain ? reinterpret_cast<const char*>(domain) : ""; }

int push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  const char* name = event->messageType == NVTX_MESSAGE_TYPE_REGISTERED
                         ? reinterpret_cast<const char*>(event->message.registered)
                         : event->message.ascii;
  std::printf("push %s:%s\n", text_of(domain), name);
  std::fflush(stdout);
  return 0;
}

int pop(nvtxDomainHandle_t domain) {
  std::printf("pop %s\n", text_of(domain));
  std::fflush(stdout);
  return 0;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t export_table) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(export_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = reinterpret_cast<NvtxFunctionPointer>(&create_domain);
  *table[NVTX_CBID_CORE2_DomainRegisterStringA] = reinterpret_cast<NvtxFunctionPointer>(&register_string);
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = reinterpret_cast<NvtxFunctionPointer>(&push);
  *table[NVTX_CBID_CORE2_DomainRangePop] = reinterpret_cast<NvtxFunctionPointer>(&pop);
  return 1;
}
