// What a function of core or of a kernel family says when it cannot do its work. Only csrc/ops turns
// one into an exception.
#pragma once

#include <string>
#include <utility>

namespace la2 {

class Status {
 public:
  static Status ok() { return Status(); }
  static Status error(std::string message) { return Status(std::move(message)); }

  bool is_ok() const { return message_.empty(); }
  const std::string& message() const { return message_; }

 private:
  Status() = default;
  explicit Status(std::string message) : message_(std::move(message)) {}
  std::string message_;
};

}  // namespace la2
